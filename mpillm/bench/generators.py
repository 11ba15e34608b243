"""The engines that generation is measured with, each in a job of its own: ``python -m mpillm.bench.generators NAME WORK``."""

import ctypes
import json
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np

from mpillm.bench.training import beyond_llama
from mpillm.errors import ConfigError, MpillmError
from mpillm.files import to_json

WARM_UP_TOKENS = 3


class Mpillm:
    """The engine of :mod:`mpillm.inference`, every rank a replica."""

    batches = (None,)  # its own

    def __init__(self, folder, threads):
        from mpillm.inference.engine import Engine

        self._engine = Engine(folder / "own")
        self._comm = self._engine.mesh.world.comm
        self.prints, self.ends_s = self._comm.rank == 0, None

    def generate(self, prompts, new, batch):
        """Return the tokens of each prompt; ``ends_s`` is when every rank had chosen its last."""
        from mpillm.inference.requests import Request, Sampling

        requests = [Request(str(i), prompt, count, Sampling(temperature=0), ignore_ends=True)
                    for i, (prompt, count) in enumerate(zip(prompts, new))]
        begin = end = time.perf_counter()

        def look(token):
            nonlocal end
            end = time.perf_counter()

        found = self._engine.generate(requests, look)
        self.ends_s = self._comm.allgather(end - begin)
        return [result.tokens for result in found]


class _Peer:
    """An engine of one process."""

    batches, prints, ends_s = (8, 32), True, None


def batches(prompts, new, batch):
    """Return the numbers of prompts in parts of a size, those together that get about as many tokens."""
    order = sorted(range(len(prompts)), key=lambda i: (new[i], len(prompts[i])))
    return [order[start:start + batch] for start in range(0, len(order), batch)]


class CTranslate2(_Peer):
    """CTranslate2 over batches."""

    @staticmethod
    def convert(folder, source, model):
        """Write the model into ``folder``."""
        import ctranslate2

        ctranslate2.converters.TransformersConverter(str(folder / "hf")).convert(str(folder / "ctranslate2"), force=True)

    def __init__(self, folder, threads):
        import ctranslate2

        path = str(folder / "ctranslate2")
        self._generator = ctranslate2.Generator(path, compute_type="float32", intra_threads=threads)
        self._words = json.loads((folder / "ctranslate2" / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts, new, batch):
        """Return the tokens of each prompt."""
        found = {}
        for part in batches(prompts, new, batch):
            left = [new[i] for i in part]

            def is_done(step, left=left):
                left[step.batch_id] -= 1
                return left[step.batch_id] == 0

            most = max(left)
            results = self._generator.generate_batch(
                [[self._words[token] for token in prompts[i]] for i in part], max_length=most, min_length=most, end_token=[],
                include_prompt_in_result=False, callback=is_done if min(left) < most else None)
            found |= {i: result.sequences_ids[0][:new[i]] for i, result in zip(part, results)}
        return [found[i] for i in range(len(prompts))]


class Transformers(_Peer):
    """``generate`` of transformers over batches, padded on the left."""

    def __init__(self, folder, threads):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._model = torch, AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts, new, batch):
        """Return the tokens of each prompt."""
        torch, found = self._torch, {}
        for part in batches(prompts, new, batch):
            width, count = max(len(prompts[i]) for i in part), max(new[i] for i in part)
            tokens = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in part])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
            made = self._model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
            found |= {i: row[width:width + new[i]].tolist() for i, row in zip(part, made)}
        return [found[i] for i in range(len(prompts))]


class LlamaCpp(_Peer):
    """llama.cpp by its C interface: rows join and leave between passes, as in its server."""

    _PASS_TOKENS = 512

    @staticmethod
    def convert(folder, source, model):
        """Write the model into ``folder``.

        Raises
        ------
        ConfigError
            If its shape is not that of a Llama.
        """
        import gguf
        import torch

        from mpillm.hf.gguf import INTERLEAVED, LLAMA
        from mpillm.hf.tensors import tensors_of

        others = [key for key in beyond_llama(model) if key != "tie_embeddings"]
        if others:
            raise ConfigError("--peers: the peer by llama.cpp computes the form of Llama, not model."
                              f"{', model.'.join(others)}: leave out --peers")
        writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
        for key, meaning in LLAMA.keys.items():
            value = getattr(model, meaning.ours)
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        writer.add_uint32("llama.rope.dimension_count", model.head_dim)
        writer.add_tokenizer_model("no_vocab")
        for name, tensor in tensors_of(LLAMA, model).items():
            values = tensor.joined([torch.as_tensor(source.read(part.name)).view(part.shape) for part in tensor.parts])
            if name.endswith(INTERLEAVED):
                values = values.unflatten(0, (-1, 2, model.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            writer.add_tensor(name, values.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def __init__(self, folder, threads):
        import llama_cpp

        self._library, self._threads = llama_cpp, threads
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), settings)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts, new, batch):
        """Return the tokens of each prompt."""
        library, settings = self._library, self._library.llama_context_default_params()
        rows = min(batch, len(prompts))
        settings.n_seq_max, settings.kv_unified = rows, True
        settings.n_ctx = rows * (max(map(len, prompts)) + max(new))
        settings.n_batch = settings.n_ubatch = self._PASS_TOKENS
        settings.n_threads = settings.n_threads_batch = self._threads
        context = library.llama_init_from_model(self._model, settings)
        memory, work = library.llama_get_memory(context), library.llama_batch_init(self._PASS_TOKENS, 0, 1)
        found, waiting, free = [[] for _ in prompts], deque(range(len(prompts))), deque(range(rows))
        running = {}  # by place: the prompt's number, its next tokens, their first position
        while waiting or running:
            while waiting and free:
                number = waiting.popleft()
                running[free.popleft()] = number, prompts[number], 0
            work.n_tokens, choosing = 0, {}
            for place, (number, tokens, start) in sorted(running.items(), key=lambda item: len(item[1][1])):
                room = self._PASS_TOKENS - work.n_tokens
                for i, token in enumerate(tokens[:room]):
                    self._put(work, token, start + i, place, i == len(tokens) - 1)
                running[place] = number, tokens[room:], start + min(room, len(tokens))
                if tokens and len(tokens) <= room:
                    choosing[place] = work.n_tokens - 1
            if library.llama_decode(context, work):
                raise MpillmError("llama_decode failed")
            for place, row in choosing.items():
                number, _, start = running[place]
                logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, row), (self._vocab_size,))
                found[number].append(int(logits.argmax()))
                running[place] = number, found[number][-1:], start
                if len(found[number]) == new[number]:
                    del running[place]
                    free.append(place)
                    library.llama_memory_seq_rm(memory, place, -1, -1)
        library.llama_batch_free(work)
        library.llama_free(context)
        return found

    @staticmethod
    def _put(work, token, position, place, is_asked):
        i = work.n_tokens
        work.token[i], work.pos[i], work.n_seq_id[i], work.seq_id[i][0], work.logits[i] = token, position, 1, place, is_asked
        work.n_tokens += 1


ENGINES = {"mpillm": Mpillm, "ctranslate2": CTranslate2, "llama.cpp": LlamaCpp, "transformers": Transformers}


def run(engine, workload):
    """Do a workload, in as many ways as it may be done; return the fastest."""
    prompts, new = workload["prompts"], workload["new"]
    batches = engine.batches if workload["mixes"] else (len(prompts),)
    best = None
    for batch in batches:
        others = [prompt[::-1] for prompt in prompts[:batch]]  # of which nothing is known when it counts
        engine.generate(others, [min(count, WARM_UP_TOKENS) for count in new[:batch]], batch)
        begin = time.perf_counter()
        found = engine.generate(prompts, new, batch)
        seconds = time.perf_counter() - begin
        if [*map(len, found)] != new:
            raise MpillmError(f"{workload['name']}: {sum(map(len, found))} tokens in place of {sum(new)}")
        if best is None or seconds < best["seconds"]:
            best = {"seconds": seconds, "batch": batch, "first": [tokens[0] for tokens in found], "ends_s": engine.ends_s}
    return best


def main(name, path):
    """Run the job."""
    work = json.loads(Path(path).read_text(encoding="utf-8"))
    engine = ENGINES[name](Path(work["folder"]), work["threads"])
    found = {workload["name"]: run(engine, workload) for workload in work["workloads"]}
    if engine.prints:
        print(to_json(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
