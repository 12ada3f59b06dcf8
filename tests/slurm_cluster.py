"""A real Slurm on this machine, for tests: one controller, several node daemons that share the machine.

    python tests/slurm_cluster.py start [--nodes 2] [--cpus 2] [--memory 6000] [--gpus 0]
    python tests/slurm_cluster.py stop

It needs root and the packages `slurm-wlm` and `munge` (Debian, Ubuntu). Everything lies in one folder, keys and logs
too; the machine's own /etc/slurm is left alone. A process uses the cluster when SLURM_CONF names the configuration.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
FOLDER = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "itera-lite-slurm"


def missing():
    """Why no cluster can be started here; "" where one can."""
    absent = [p for p in PROGRAMS if not shutil.which(p)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def free_ports(count):
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def configuration(folder, nodes, cpus, memory, gpus, limits):
    port, *node_ports = free_ports(nodes + 1)
    host = socket.gethostname().split(".")[0]
    lines = [
        "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={port}", "SlurmUser=root",
        "SlurmdUser=root", "AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log", f"SlurmdLogFile={folder}/log/%n.log",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none", "MpiDefault=none",
        "MailProg=/bin/true", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=500", "SlurmdParameters=config_overrides", "ReturnToService=2", "KillWait=30", "MinJobAge=86400",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2,requeue_delay=0",
        "AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=task=2", *limits,
    ]
    if gpus:
        lines.append("GresTypes=gpu")
    for i in range(1, nodes + 1):
        gres = f" Gres=gpu:{gpus}" if gpus else ""
        lines.append(
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports[i - 1]} CPUs={cpus}"
            f" RealMemory={memory}{gres} State=UNKNOWN"
        )
    lines += [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        "PartitionName=short Nodes=ALL MaxTime=30 State=UP",
    ]
    return "\n".join(lines) + "\n"


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60, **options)


def start(folder=FOLDER, nodes=2, cpus=2, memory=6000, gpus=0, limits=()):
    """Start the daemons; raises RuntimeError where the nodes do not become idle. Returns the configuration's path."""
    folder = Path(folder)
    if why := missing():
        raise RuntimeError(why)
    stop(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("state", "log", "dev", *(f"spool/node{i}" for i in range(1, nodes + 1))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(configuration(folder, nodes, cpus, memory, gpus, limits))
    gres = []
    for i in range(gpus):  # a GPU must name a device; a null device does for counting
        os.mknod(folder / f"dev/nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
    if gpus:
        gres = [f"NodeName=node[1-{nodes}] Name=gpu File={folder}/dev/nvidia[0-{gpus - 1}]"]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")
    done = run(
        "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/munge.seed",
    )
    if done.returncode:
        raise RuntimeError(f"munged did not start: {done.stderr.strip()}")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    for command in (["slurmctld"], *(["slurmd", "-N", f"node{i}"] for i in range(1, nodes + 1))):
        done = run(*command)
        if done.returncode:
            raise RuntimeError(f"{command[0]} did not start: {done.stderr.strip()}; see {folder}/log")
    for _ in range(150):
        states = run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        if len({line for line in states if line.endswith(" idle")}) >= nodes:
            return folder / "slurm.conf"
        time.sleep(0.2)
    raise RuntimeError(f"the nodes did not become idle ({'; '.join(states)}); see {folder}/log")


def end(pid_file):
    """End a daemon that a pid file names."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                break
            time.sleep(0.05)
        else:
            os.kill(pid, signal.SIGKILL)
    pid_file.unlink(missing_ok=True)


def stop(folder=FOLDER):
    """Cancel all jobs and end the daemons that `start` started."""
    folder = Path(folder)
    if (folder / "slurmctld.pid").exists():
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        with contextlib.suppress(subprocess.TimeoutExpired):
            jobs = run("squeue", "--noheader", "--format=%A").stdout.split()
            if jobs:
                run("scancel", "--signal=KILL", *jobs)
                run("scancel", *jobs)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
    for file in (*sorted(folder.glob("slurmd-*.pid")), folder / "slurmctld.pid", folder / "munged.pid"):
        end(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=6000, help="megabytes of a node")
    parser.add_argument("--gpus", type=int, default=0, help="pretended GPUs of a node")
    args = parser.parse_args()
    if args.what == "stop":
        return stop()
    try:
        conf = start(nodes=args.nodes, cpus=args.cpus, memory=args.memory, gpus=args.gpus)
    except RuntimeError as error:
        sys.exit(f"no cluster: {error}")
    print(f"export SLURM_CONF={conf}")


if __name__ == "__main__":
    main()
