"""An engine without Docker and without network: a session server in this process.

It speaks the part of Dagger's API that `pipelines` uses, so the real SDK and the
real pipelines run on it unchanged. Commands run in a bubblewrap sandbox over the
host's own root; images are not pulled.
"""

from moonmind_ext.embedded.server import EmbeddedEngine, sandbox_problem, serve

__all__ = ["EmbeddedEngine", "sandbox_problem", "serve"]
