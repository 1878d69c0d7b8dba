# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Makes Hydra find the nodes of torchrl_rpd, without an import in the script.

Hydra imports every module of the namespace package ``hydra_plugins`` when an application
starts: this one therefore imports nothing but Hydra, and registers the nodes only in
applications that use TorchRL.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class TorchRLRPDPlugin(SearchPathPlugin):
    """Registers the nodes whenever Hydra is about to look for configurations."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leaves the search path alone: the nodes are in Hydra's own store."""
        if "torchrl" not in sys.modules:
            return
        from torchrl_rpd.configs import register

        register()
