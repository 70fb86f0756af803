"""nbconvert's configuration: show a notebook's output as it comes, and keep one that fails or is stopped."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.exporters import NotebookExporter
from nbconvert.preprocessors import ExecutePreprocessor


class LiveExecutePreprocessor(ExecutePreprocessor):
    """Execute in the folder where nbconvert was started; on failure, write the notebook as far as it came.

    SIGINT and SIGTERM interrupt the running cell, which may save its work, where stock nbconvert kills the kernel. An
    error that a user can put right is told in its one message, with its own exit code, as on the command line.
    """

    stopped_by = exit_code = None
    last_stop = 0.0

    def _stop(self, number, frame):
        if self.km is None or not self.km.has_kernel:
            sys.exit(128 + number)
        self.stopped_by = self.stopped_by or number
        if time.monotonic() > self.last_stop + 1:  # from a terminal it comes twice, from there and from run_all.sh
            self.last_stop = time.monotonic()
            os.kill(self.km.provisioner.pid, signal.SIGINT)

    def preprocess(self, nb, resources=None, km=None):
        resources["metadata"]["path"] = os.getcwd()
        path = Path(os.environ["OUTDIR"], f"{resources['metadata']['name']}.ipynb")
        finished = path.with_name("metrics.json").exists()  # a run, which may refuse this one
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            return super().preprocess(nb, resources, km)
        except BaseException as error:
            kept = f"as far as it came is {path}"
            try:
                if not (finished and self.exit_code):
                    nbformat.write(self.nb, path)
            except OSError as problem:  # as on a full disk
                kept = f"cannot be written to {path}: {problem.strerror}"
            if self.stopped_by:
                print(f"interrupted; the notebook {kept}", file=sys.stderr)
                sys.exit(128 + self.stopped_by)
            if self.exit_code is not None:
                print(f"error: {error.evalue}", file=sys.stderr)
                sys.exit(self.exit_code)
            if isinstance(error, CellExecutionError | CellTimeoutError | DeadKernelError):
                sys.exit(f"{error}\nerror: a cell failed; the notebook {kept}")
            raise

    def preprocess_cell(self, cell, resources, index):
        if self.stopped_by:  # while no cell ran a kernel ignores it
            sys.exit(128 + self.stopped_by)
        try:
            return super().preprocess_cell(cell, resources, index)
        except CellExecutionError:
            self.exit_code = None if self.stopped_by else self._ask_for_exit_code()
            raise

    def _ask_for_exit_code(self):
        """That of the error in which a cell ended; None if it has none, since it is not one of the package's."""
        asked = {"code": "int(__import__('sys').last_value.exit_code)"}
        reply = {"status": "aborted"}  # as a request is that comes too soon after an error
        while reply["status"] == "aborted":
            reply = self.wait_for_reply(self.kc.execute("", silent=True, user_expressions=asked))["content"]
        answer = reply["user_expressions"]["code"]
        return int(answer["data"]["text/plain"]) if answer["status"] == "ok" else None

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True, file=getattr(sys, msg["content"]["name"]))
        return super().process_message(msg, cell, cell_index)


for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="backslashreplace")  # where it is ASCII
stock = "nbconvert.preprocessors.ExecutePreprocessor"
c = get_config()  # noqa: F821, which traitlets provides
c.NotebookExporter.default_preprocessors = [
    LiveExecutePreprocessor if name == stock else name for name in NotebookExporter().default_preprocessors
]
c.LiveExecutePreprocessor.shutdown_kernel = "immediate"  # interrupted first, it may end in a stack trace of its own
# No ports: nobody else on the machine can talk to the kernel. In a folder of its own, since Jupyter's sockets would
# otherwise lie in the folder it is started in, where those of another notebook have the same names. Their paths must be
# short, which TMPDIR may not be.
long = len(tempfile.gettempdir()) > 80
sockets = tempfile.TemporaryDirectory(prefix="kernel-", dir="/tmp" if long else None)
c.KernelManager.transport = "ipc"
c.KernelManager.ip = str(Path(sockets.name, "socket"))
