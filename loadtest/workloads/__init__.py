"""What requests ask for: public traces, a user's own files, and prompts made to measure; one module a source."""

from typing import Annotated

from pydantic import Field

from loadtest.workloads.azure import AzureWorkload
from loadtest.workloads.draft import Draft, Setting, Workload, data_folder
from loadtest.workloads.jsonl import JsonlWorkload
from loadtest.workloads.mooncake import MooncakeWorkload
from loadtest.workloads.mt_bench import MtBenchWorkload
from loadtest.workloads.servegen import ServegenWorkload
from loadtest.workloads.synthetic import SyntheticWorkload

AnyWorkload = Annotated[
    AzureWorkload | JsonlWorkload | MooncakeWorkload | MtBenchWorkload | ServegenWorkload | SyntheticWorkload,
    Field(discriminator="kind"),
]

__all__ = ["AnyWorkload", "Draft", "Setting", "Workload", "data_folder"]
