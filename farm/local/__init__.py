"""The embedded stack: real servers from wheels, and the whole farm on one machine.

Importing this package loads neither the servers' wheels nor torch.
"""

from farm.local.errors import StackError
from farm.local.servers import Servers, embedded_servers
from farm.local.up import LocalFarm, running_farm

__all__ = ["LocalFarm", "Servers", "StackError", "embedded_servers", "running_farm"]
