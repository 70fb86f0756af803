"""nbconvert's configuration: show a notebook's output as it comes, and keep a notebook that fails."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.exporters import NotebookExporter
from nbconvert.preprocessors import ExecutePreprocessor


class LiveExecutePreprocessor(ExecutePreprocessor):
    """Execute in the folder where nbconvert was started; on failure, write the notebook as far as it came."""

    def preprocess(self, nb, resources=None, km=None):
        resources["metadata"]["path"] = os.getcwd()
        try:
            return super().preprocess(nb, resources, km)
        except BaseException as error:
            path = Path(os.environ["NOTEBOOK_FOLDER"], f"{resources['metadata']['name']}.ipynb")
            nbformat.write(self.nb, path)
            if isinstance(error, CellExecutionError | CellTimeoutError | DeadKernelError):
                sys.exit(f"{error}\nerror: the notebook failed; as far as it came it is {path}")
            raise

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True, file=getattr(sys, msg["content"]["name"]))
        return super().process_message(msg, cell, cell_index)


stock = "nbconvert.preprocessors.ExecutePreprocessor"
c = get_config()  # noqa: F821, which traitlets provides
c.NotebookExporter.default_preprocessors = [
    LiveExecutePreprocessor if name == stock else name for name in NotebookExporter().default_preprocessors
]
c.KernelManager.transport = "ipc"  # no ports: nothing else on the machine can talk to the kernel
