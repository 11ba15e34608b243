"""The pipeline schedules that PyTorch makes, without its stages."""

from types import SimpleNamespace

from torch.distributed.pipelining import schedules


def made_by_pytorch(name, num_ranks, num_microbatches, chunks=1):
    """Return an object of PyTorch's schedule class ``name``, which raises ``ValueError`` for sizes that it does not make."""
    stages = [SimpleNamespace(num_stages=num_ranks * chunks, group_size=num_ranks, group_rank=0, submod=None)] * chunks
    made = getattr(schedules, name)
    return made(stages if issubclass(made, schedules.PipelineScheduleMulti) else stages[0], num_microbatches)
