"""The ``nagaya`` command: an HTTP client of the API, and nothing more.

Exit codes:

    0    done
    1    failed
    2    the command line is wrong (an unknown option, a size that is none, a value that the server refuses)
    3    the server does not run, cannot be reached, or cannot start
    4    there is no such machine, image, task or node
    5    refused for want of memory, processors or disk
    124  not done in time; what was asked for goes on
    130  stopped with Ctrl-C; what was asked for goes on

``nagaya exec`` ends with the exit code of the command in the guest (128 + N when signal N ended it); its own
failures use the codes above and write ``error:`` first. What is data goes to standard output; progress, errors and
hints go to standard error. Colours and bars are drawn on terminals only; ``NO_COLOR`` turns colours off.
"""
