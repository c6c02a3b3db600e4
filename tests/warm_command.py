"""Runs ``isomorph`` without the seconds that its imports take: one process imports, and forks for each command.

    python warm_command.py serve SOCKET         imports, makes SOCKET, and serves until it is killed
    python warm_command.py SOCKET ARGUMENT...   a command with this process's folder, environment and files

The fork calls the ``main()`` of the console script. Start the program itself where a test sends it signals, or is about
what happens at import: variables such as ISOMORPH_BACKEND, TRITON_INTERPRET and HF_HOME are read then.
"""

import contextlib
import json
import os
import signal
import socket
import sys


def serve(path: str) -> None:
    # what the commands import when they are called; none of it computes, so that no thread is lost in a fork
    import transformers.models.llama.modeling_llama  # noqa: F401

    import isomorph.curriculum.cli
    import isomorph.curriculum.commands.data
    import isomorph.curriculum.commands.evaluate
    import isomorph.curriculum.commands.plan
    import isomorph.curriculum.commands.report
    import isomorph.curriculum.commands.show
    import isomorph.curriculum.commands.study
    import isomorph.curriculum.commands.train
    import isomorph.curriculum.study.exam
    import isomorph.curriculum.study.page

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # waiters are reaped at once
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)  # where it is, it answers
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        command = os.fork()
        if command == 0:
            listener.close()
            connection.close()
            become(json.loads(message), files)
            isomorph.curriculum.cli.main()
            sys.exit(0)
        _, status = os.waitpid(command, 0)
        with contextlib.suppress(BrokenPipeError):  # the caller was killed
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


def become(asked: dict, files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = ["isomorph", *asked["arguments"]]


def call(path: str, arguments: list[str]) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        asked = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        return int(connection.recv(100))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
