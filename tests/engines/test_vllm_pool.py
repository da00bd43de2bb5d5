"""A whole pool whose one node runs vLLM on this machine's processors: what a client gets is what the engine says."""

from __future__ import annotations

import pytest

from tests.support.coordinator_process import CoordinatorProcess, wait_until
from tests.support.group_pool import MODEL, PROMPT, READY_SECONDS_MAX, TOKENS, VLLM_PYTHON, catalogue_text
from tests.support.pool_processes import NodeProcess, Pool, audit, new_invite
from tests.support.safetensors_model import built_in_folder

MESSAGES = [{"role": "user", "content": PROMPT}]


class VllmNode(NodeProcess):
    """A node that has vLLM and runs nothing else."""

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "POTLUCK_NODE_VLLM_PYTHON": str(VLLM_PYTHON), "POTLUCK_NODE_MODELS_ALLOWED": MODEL}


@pytest.mark.timeout(900)
def test_a_chat_through_the_whole_pool_says_what_the_engine_says(tmp_path, text_of_one_process):
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(catalogue_text(built_in_folder()))
    with CoordinatorProcess(tmp_path / "coordinator", "--catalogue", str(catalogue)) as coordinator:
        coordinator.wait_ready()
        pool = Pool(tmp_path, coordinator, [])
        with VllmNode(tmp_path / "vllm", new_invite(pool)) as node, pool.client() as client:
            wait_until(lambda: pool.connected_count(MODEL) == 1, READY_SECONDS_MAX, f"vLLM answers, see {node.folder}")
            answer = client.chat(MESSAGES, model=MODEL, max_tokens=TOKENS, temperature=0)
            assert answer.text == text_of_one_process
            with client.chat(MESSAGES, model=MODEL, max_tokens=TOKENS, temperature=0, stream=True) as stream:
                assert "".join(stream) == text_of_one_process
            (status,) = [status for each in client.nodes() for status in each.engines if status.model_id == MODEL]
            assert status.engine_kind == "vllm"
            assert audit(pool) == ()
