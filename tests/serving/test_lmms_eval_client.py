"""lmms-eval's own client of OpenAI's API, where lmms-eval is installed: `make test-lmms`.

Elsewhere test_chat_route.py sends requests of the same form.
"""

import pytest
from PIL import Image

from cafe import Cafe
from cafe.content import Content
from cafe.serving.config import ServingConfig
from cafe.serving.server import running_server, running_services

pytest.importorskip("lmms_eval")


def test_async_openai_gets_the_answers_of_the_model(random_base, monkeypatch):
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.chat.async_openai import AsyncOpenAIChat

    model = Cafe.load(random_base)
    image, question = Image.new("RGB", (64, 64), "red"), "Describe the image."
    expected = model.generate_batch([Content.of([image, question])], max_new_tokens=8)
    parts = [{"type": "image", "url": image}, {"type": "text", "text": question}]
    arguments = (question, lambda doc: [{"role": "user", "content": parts}], {"max_new_tokens": 8, "temperature": 0})
    with running_services(ServingConfig(port=0), model) as services, running_server(services) as url:
        client = AsyncOpenAIChat(model_version=services.model_id, base_url=f"{url}/v1", api_key="none")
        client.task_dict = {"task": {"test": {0: {}}}}
        request = Instance(
            request_type="generate_until",
            arguments=(*arguments, 0, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": 0, "repeats": 1},
        )
        [answer] = client.generate_until([request])
    assert [answer.text.strip()] == expected
