"""The examples' own tests run where they are installed (`strangers.Installed.own_tests`)."""

from __future__ import annotations

collect_ignore_glob = ["prima-example-*"]
