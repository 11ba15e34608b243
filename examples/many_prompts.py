"""Continue and score several texts on all ranks: mpiexec -n 2 python many_prompts.py RUN

RUN is a run directory or a folder of Hugging Face weights. The text does not depend on the number of ranks.
"""

import sys

from mpillm import Engine, Request, Sampling, launch

PROMPTS = ["The capital of France is", "The three primary colours are", "import numpy as", "Once upon a time"]


def main():
    engine = Engine(sys.argv[1])
    rows = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [Request(prompt, row, max_tokens=16, sampling=Sampling(temperature=0)) for prompt, row in zip(PROMPTS, rows)]
    # Ask for the log-probabilities of the prompts' own tokens too, from the second one on
    requests += [Request(prompt, row, max_tokens=0, scored_from=1) for prompt, row in zip(PROMPTS, rows) if len(row) > 1]
    results = engine.generate(requests)
    if engine.mesh.world.rank == 0:
        for result in results:
            print(repr(result.id + result.text) if result.tokens else f"{sum(result.scores):8.3f}  {result.id!r}")
        print(engine.caveat or "rows of a pass do not see each other")
    engine.free()


if __name__ == "__main__":
    launch(main)
