"""`potluck up`: a pool on this machine, in front, until Ctrl-C.

Decides what a newcomer is told once it runs. It must not know how it is started; `local_pool` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from potluck import calls
from potluck.address import PoolAddress
from potluck.commands.local_pool import LocalPool, LocalPoolPlan, person_key
from potluck.commands.progress import LiveLine
from potluck.commands.session import local_pool_folder
from potluck.commands.terminal import say, show
from potluck.errors import CredentialError
from potluck.transport import Transport
from potluck_protocol.interruption import ended_by_signals
from potluck_protocol.private_files import write_private

PERSON: Final = "you"
KEY_NAME: Final = "potluck up"

CatalogueOption = Annotated[
    Path | None, typer.Option("--catalogue", exists=True, dir_okay=False, help="TOML file with models beside the built-in one.")
]


def up(
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="OpenAI API. 0: any free port.")] = 8600,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="SDK. 0: any free port.")] = 8601,
    link_port: Annotated[int, typer.Option(min=0, max=65535, help="The node's link. 0: any free port.")] = 8602,
    catalogue: CatalogueOption = None,
) -> None:
    """Run a whole pool on this machine until Ctrl-C: a coordinator, and a node with a small model.

    The first start fetches the model, about 100 MB; later ones take seconds. Nothing listens beyond this machine. State is kept in
    `$XDG_STATE_HOME/potluck/up`, models in `$XDG_CACHE_HOME/potluck`, or in `agent-2` there beside another node that runs. Logs are beside
    the state: coordinator.log and node.log of this start, coordinator.log.1 and node.log.1 of the one before. While it runs,
    `potluck node status`, `pause` and `resume` speak to its node.
    """
    folder = local_pool_folder()
    plan = LocalPoolPlan(folder, http_port, grpc_port, link_port, catalogue, owner_name=PERSON)
    try:
        with ended_by_signals(), LiveLine() as line, LocalPool(plan, line) as pool:
            pool.start()
            line.end()
            key_file = folder / "api_key"
            show(_welcome(pool, key_file))
            try:
                pool.watch()
            finally:
                line.update("Stopping")
    except KeyboardInterrupt:
        say("Stopped; nothing is left running.")


def _welcome(pool: LocalPool, key_file: Path) -> str:
    url = pool.operator.url
    api_key = _kept_key(pool, key_file)
    model = next(model.model_id for model in pool.transport.unary(calls.list_models()) if model.ready_replica_count)
    return f"""
Potluck is up. Ctrl-C stops it.

  OpenAI base URL  {url}/v1
  API key          {api_key}   (also in {key_file})

What the node here earns goes to the same account: `potluck credits`. `potluck node pause` gives you this machine back,
`potluck node resume` shares it again, `potluck node status` shows what it does.

Three things to try, in another terminal:

export POTLUCK_URL={url} POTLUCK_API_KEY={api_key}

1. With this command:

potluck chat "Why do people share food?"

2. With curl:

curl "$POTLUCK_URL/v1/chat/completions" -H "Authorization: Bearer $POTLUCK_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

3. With the openai package:

python -c 'import os, openai
client = openai.OpenAI(base_url=os.environ["POTLUCK_URL"] + "/v1", api_key=os.environ["POTLUCK_API_KEY"])
answer = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello!"}}])
print(answer.choices[0].message.content)'
"""


def _kept_key(pool: LocalPool, key_file: Path) -> str:
    """The key of earlier starts while it is good, else a new one; in a file that only this person can read."""
    if key_file.is_file():
        api_key = key_file.read_text().strip()
        kept = Transport(PoolAddress(pool.operator.url, api_key))
        try:
            kept.unary(calls.get_balance())
        except CredentialError:
            key_file.unlink()
        else:
            return api_key
        finally:
            kept.close()
    api_key = person_key(pool.transport, PERSON, KEY_NAME)
    write_private(key_file, api_key.encode() + b"\n")
    return api_key
