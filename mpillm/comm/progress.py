"""What this process has under way without MPI's knowledge, and waiting that lets all of it go on, as MPI's own would."""

import os

under_way = []  # objects whose ``advance()`` does what can be done now, and leaves the list at the end


def advance():
    """Let all that is under way go on. Local."""
    for operation in list(under_way):
        operation.advance()


def finish(request):
    """Wait for a request, leaving the core to others meanwhile: ranks may outnumber cores."""
    while not request.Test():
        advance()
        os.sched_yield()
