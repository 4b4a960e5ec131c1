"""Every setting of the program: one line in one table, a flag and a flat environment twin.

The table is read once, at the edge, by `cli.py`; everything below gets values.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rich_click as click

Command = Callable[..., Any]  # click decorates functions of every signature

PORT = 7746
CLUSTER_PORT = 7747
LOCAL_TRANSPORT = "unix" if hasattr(socket, "AF_UNIX") and sys.platform != "win32" else "tcp"


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting: `flags` as click takes them; the environment twin is PRIMA_ and the name in capitals."""

    name: str
    flags: tuple[str, ...]
    kind: Any  # click's parameter types have no common static type with Python's own
    default: object
    help: str

    @property
    def env(self) -> str:
        return f"PRIMA_{self.name.upper()}"


_FILE = click.Path(dir_okay=False)
_FOLDER = click.Path(file_okay=False)
_POSITIVE = click.IntRange(min=1)

TABLE = (
    Setting("backend", ("--backend",), str, "auto", "What computes: auto, or backends and devices, best first, e.g. torch:cuda:0,numpy."),
    Setting("threads", ("-t", "--threads"), click.IntRange(0, 1024), 0, "Compute threads of a node; 0: its physical cores."),
    Setting("kernels", ("--kernels",), str, "auto", "How a backend computes; numpy: auto, native, int8, exact; torch: auto, triton, torch."),
    Setting("context", ("-c", "--context"), _POSITIVE, None, "Context length in tokens.  [default: the model's, to 8192]"),
    Setting("kv_type", ("--kv-type",), click.Choice(["f16", "q8_0", "f32"]), None, "What K and V are kept in.  [default: f16]"),
    Setting("parallel", ("--parallel",), _POSITIVE, 4, "KV room for so many full contexts."),
    Setting("context_shift", ("--context-shift",), click.BOOL, False, "When the context is full, forget its older half and go on."),
    Setting("queue", ("--queue",), _POSITIVE, 512, "Requests that may wait; more are refused (503)."),
    Setting("chunk", ("--chunk",), click.IntRange(1, 4096), None, "Prompt tokens per prefill step.  [default: 64; one node: 128; with a GPU: 512]"),
    Setting("nodes", ("--nodes",), click.IntRange(1, 64), 1, "Local node processes, this one counted."),
    Setting("wait", ("--wait",), _POSITIVE, 1, "Wait for so many nodes, this one counted, before the first plan."),
    Setting("plan", ("--plan",), _FILE, None, "Use this plan file instead of a solver."),
    Setting("solver", ("--solver",), str, "halda", "What makes the plan."),
    Setting("goal", ("--goal",), click.Choice(["latency", "throughput", "ttft"]), "latency", "Least time per token, most tokens/s of --parallel sequences, or least time to the first."),
    Setting("rounds", ("--rounds",), click.IntRange(1, 1024), None, "Visit every node so many times for a token.  [default: 1, or what hides the disk]"),
    Setting("transport", ("--transport",), str, LOCAL_TRANSPORT, "Between local nodes: unix, tcp, ipc, inproc or a plugin's."),
    Setting("wire", ("--wire",), click.Choice(["auto", "f32", "f16"]), "auto", "Activations between nodes; auto: prefill f16."),
    Setting("memory", ("--memory",), str, None, "Host memory that this node may use, e.g. 4GB.  [default: what is available]"),
    Setting("listen", ("--listen",), str, None, "Where other machines join, e.g. 0.0.0.0:7747 or tcp://0.0.0.0:7747."),
    Setting("advertise", ("--advertise",), str, None, "Host name or address that other nodes reach this one by."),
    Setting("token_file", ("--token-file",), _FILE, None, "File with the cluster's token.  [default: in the state folder]"),
    Setting("host", ("--host",), str, "127.0.0.1", "HTTP interface; to serve on another than loopback wants an API key."),
    Setting("port", ("--port",), click.IntRange(0, 65535), PORT, "HTTP port; to serve, 0 is any free one."),
    Setting("api_key", ("--api-key",), str, None, "Key that clients send (better: the environment variable)."),
    Setting("model_file", ("--model",), _FILE, None, "Model file of this node."),
    Setting("models", ("--models",), _FOLDER, None, "Folder of models.  [default: in the user's data folder]"),
    Setting("name", ("--name",), str, None, "This node's name in plans.  [default: the host's name]"),
    Setting("chat_template", ("--chat-template",), str, "default", "The chat template, of those that the model file names."),
    Setting("temp", ("--temp",), click.FloatRange(0, 100), None, "Sampling temperature; 0: always the likeliest token."),
    Setting("top_k", ("--top-k",), click.IntRange(min=0), None, "Draw from the K likeliest tokens; 0: from all."),
    Setting("top_p", ("--top-p",), click.FloatRange(0, 1), None, "Draw from the likeliest tokens that make up P."),
    Setting("min_p", ("--min-p",), click.FloatRange(0, 1), None, "Draw from tokens at least P times as likely as the likeliest."),
    Setting("repeat_penalty", ("--repeat-penalty",), click.FloatRange(0.01, 100), None, "Makes the last 64 tokens less likely; 1: no."),
    Setting("presence_penalty", ("--presence-penalty",), click.FloatRange(-2, 2), 0.0, "Makes tokens of the answer less likely."),
    Setting("frequency_penalty", ("--frequency-penalty",), click.FloatRange(-2, 2), 0.0, "The same, for each time they came."),
    Setting("seed", ("--seed",), int, None, "Seed of the sampling.  [default: a new one each time]"),
    Setting("max_tokens", ("-n", "--max-tokens"), _POSITIVE, None, "Tokens to generate at most."),
    Setting("log_level", ("--log-level",), click.Choice(["debug", "info", "warning", "error"]), "warning", "What is logged."),
)  # fmt: skip

SETTINGS = {setting.name: setting for setting in TABLE}


def options(*names: str, panel: str | None = None) -> Callable[[Command], Command]:
    """Decorator that adds these settings to a click command, in this order, under this heading of its help (else Options)."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            setting = SETTINGS[name]
            command = click.option(
                *setting.flags,
                setting.name,
                type=setting.kind,
                is_flag=setting.kind is click.BOOL,
                default=setting.default,
                show_default=setting.default is not None,
                envvar=setting.env,
                show_envvar=True,
                help=setting.help,
                panel=panel,
            )(command)
        return command

    return add
