"""The engine as a model of ``lm-eval`` (EleutherAI's evaluation harness), which rank 0 runs.

``mpiexec -n 4 python -m mpillm.inference.harness run --model mpillm --model_args path=RUN --tasks T`` is the harness' own
command on all ranks of a launch.
"""

import os

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # which the libraries read when they are imported
    os.environ.setdefault(_name, "1")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mpillm.data.tokenizers import new_document  # noqa: E402
from mpillm.errors import OK, ConfigError, DataError  # noqa: E402
from mpillm.inference.crew import Crew  # noqa: E402
from mpillm.inference.requests import Request, Sampling, seed_of  # noqa: E402
from mpillm.inference.scoring import encode  # noqa: E402

OUTPUTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # of the harness and of Sampling alike
_OTHERS = ("do_sample", "until", "max_gen_toks")


class Model(LM):
    """What the harness asks, the engine on all ranks answers. On rank 0.

    Parameters
    ----------
    crew : Crew
        With its engine.
    """

    def __init__(self, crew):
        super().__init__()
        self._crew = crew

    def loglikelihood(self, requests, disable_tqdm=False):
        """Return the log-probability of each continuation, and whether it is the likeliest."""
        return [(score.logprob, score.is_greedy) for score in self._crew.ask("score", [request.args for request in requests])]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Return the log-probability of each text."""
        return [score.logprob for score in self._crew.ask("score", [text for text, in (request.args for request in requests)])]

    def generate_until(self, requests, disable_tqdm=False):
        """Return how each context goes on."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        return [result.text for result in self._crew.ask("generate", asked)]

    def _request(self, number, context, settings):
        """Return the request for a context: of one that leaves no room for the answer the first tokens are dropped."""
        engine, settings = self._crew.engine, normalize_gen_kwargs(settings)
        unknown = sorted(set(settings) - {*SETTINGS, *_OTHERS})
        if unknown:
            raise ConfigError(f"generation_kwargs.{unknown[0]}: generation takes {', '.join((*_OTHERS, *SETTINGS))}")
        longest = engine.config.model.max_seq_len
        limit = min(settings["max_gen_toks"], longest - 1)
        prompt = encode(engine.tokenizer, context, "context")[limit - longest:] or new_document(engine.tokenizer)
        sampling = Sampling(**{name: settings[name] for name in SETTINGS if name in settings}, seed=seed_of(0, number))
        stops = tuple(stop for stop in handle_stop_sequences(settings["until"], None) if stop)
        return Request(str(number), prompt, limit, sampling, stops)


class Tasks(TaskManager):
    """The tasks of the harness, which says in words what it has not, or cannot be done here."""

    def load(self, names):
        """Return the tasks of these names."""
        unknown = sorted(set(names) - set(self.all_tasks))
        if unknown:
            raise ConfigError(f"--tasks {unknown[0]}: lm-eval knows no such task: python -m lm_eval ls tasks lists its own, "
                              "--include-path DIR adds those of a folder")
        try:
            loaded = super().load(names)
        except Exception as error:  # a dataset that is not there, a file that is wrong, in the words of many libraries
            raise DataError(f"--tasks {','.join(names)}: cannot be loaded ({type(error).__name__}: {error}); data comes from "
                            "the net only if HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set") from error
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE not in OUTPUTS or getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"--tasks {name}: asks for {task.OUTPUT_TYPE}"
                                  f"{' and pictures' * getattr(task, 'MULTIMODAL', False)}: there are {', '.join(OUTPUTS)}")
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(f"--tasks {name}: runs code that the model wrote, which evaluate does not")
        return loaded


def evaluate(crew, names, include_path=None, num_fewshot=None, limit=None):
    """Return the results of tasks, as the harness gives them without what depends on the launch. On rank 0, in
    :meth:`~mpillm.inference.crew.Crew.run`.

    Parameters
    ----------
    crew : Crew
        With its engine.
    names : list of str
    include_path : str, optional
        A folder with tasks of one's own.
    num_fewshot, limit : int, optional
        Examples before each question; questions of each task.
    """
    manager = Tasks(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(names) <= set(manager.all_subtasks):  # some come with the harness, whose list is long
        manager = Tasks(include_path=include_path)
    found = simple_evaluate(Model(crew), tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager,
                            log_samples=False)
    return {key: found[key] for key in KEPT if key in found}


def main():
    """Run the harness' own command, in which ``--model mpillm --model_args path=RUN`` is this launch."""
    from mpillm.comm.world import comm_world

    crew = Crew(comm_world())

    @register_model("mpillm")
    class Registered(Model):
        def __init__(self, path, batch_size=None, max_batch_size=None, device=None, **overrides):
            crew.ask("open", path, overrides)
            super().__init__(crew)

    return crew.comm.bcast(crew.run(_command))


def _command():
    try:
        cli_evaluate()
    except SystemExit as ending:
        return ending.code
    return OK


if __name__ == "__main__":
    from mpillm.comm.world import launch

    launch(main)
