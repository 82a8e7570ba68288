"""What Slurm's srun --mpi=pmi2 says to two MPI processes on two nodes, and what they say to it."""

import selectors
import socket
import subprocess
from collections.abc import Mapping, Sequence

from support.launching import TIMEOUT

ANSWERS = {
    "init": "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1",
    "get_maxes": "cmd=maxes rc=0 kvsname_max=256 keylen_max=64 vallen_max=1024",
    "get_appnum": "cmd=appnum rc=0 appnum=-1",
    "get_my_kvsname": "cmd=my_kvsname rc=0 kvsname=7.0",
    "get_universe_size": "cmd=universe_size rc=0 size=2",
    "put": "cmd=put_result rc=0",
    "finalize": "cmd=finalize_ack rc=0",
}


def run_two(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Run a command twice, as the two processes of step 7.0, and return the lines of their puts."""
    values = {"PMI_process_mapping": "(vector,(0,2,1))"}
    puts: list[str] = []
    processes = []
    waiting: list[socket.socket] = []
    with selectors.DefaultSelector() as selector:
        for rank in range(2):
            ours, theirs = socket.socketpair()
            variables = {"PMI_FD": f"{theirs.fileno()}", "PMI_JOBID": "7.0", "PMI_SIZE": "2"}
            process = subprocess.Popen(
                command,
                env={**environment, **variables, "PMI_RANK": f"{rank}"},
                pass_fds=[theirs.fileno()],
            )
            processes.append(process)
            theirs.close()
            selector.register(ours, selectors.EVENT_READ)
        while selector.get_map():
            events = selector.select(TIMEOUT)
            if not events:
                for process in processes:
                    process.kill()
            for key, _ in events:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                line = connection.recv(10000).decode()
                if not line:
                    selector.unregister(connection)
                    connection.close()
                    continue
                words = dict(word.split("=", 1) for word in line.split())
                request = words["cmd"]
                if request == "barrier_in":
                    waiting.append(connection)
                    if len(waiting) == 2:
                        for other in waiting:
                            other.sendall(b"cmd=barrier_out rc=0\n")
                        waiting.clear()
                    continue
                if request == "put":
                    values[words["key"]] = words["value"]
                    puts.append(line)
                if request == "get":
                    value = values.get(words["key"])
                    answer = f"cmd=get_result rc={0 if value else 1}"
                    answer += f" value={value}" if value else ""
                else:
                    answer = ANSWERS[request]
                connection.sendall(f"{answer}\n".encode())
    assert [process.wait() for process in processes] == [0, 0]
    return puts
