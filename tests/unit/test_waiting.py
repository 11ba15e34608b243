"""What waits in shared memory lets messages go on, also where the library copies them piece by piece."""

from pathlib import Path

import pytest
from helpers import run_mpi

BY_PIECES = {  # each library, told not to read the sender's memory: then both sides must stay in MPI
    "MPIR_CVAR_CH4_CMA_ENABLE": "0",
    "OMPI_MCA_smsc": "^cma,xpmem", "OMPI_MCA_pml": "ob1", "OMPI_MCA_osc": "^ucx",
}


@pytest.mark.launches
def test_who_waits_in_shared_memory_goes_on_sending():
    job = run_mpi(4, [Path(__file__).parents[1] / "waiting.py"], timeout=60, env=BY_PIECES)
    assert job.stdout.count("done") == 4, job.stdout + job.stderr
