"""Ask a server about a photo, at several budgets: `python examples/client.py [ADDRESS] [PHOTO] [QUESTION]`.

`dymu serve` takes a request's budget as a field, `dymu vllm` within `mm_processor_kwargs`; this sends the one that the
server knows.
"""

import base64
import json
import mimetypes
import sys
import urllib.error
import urllib.request
from pathlib import Path

DEFAULTS = ("http://127.0.0.1:8000/v1", "examples/photo.jpg", "What is this?")
address, photo, question = (*sys.argv[1:4], *DEFAULTS[len(sys.argv) - 1 :])
kind = mimetypes.guess_type(photo)[0]
image = f"data:{kind};base64," + base64.b64encode(Path(photo).read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]


def ask(**fields):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16, **fields}
    request = urllib.request.Request(
        f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        return json.load(error)


in_kwargs = "error" not in ask(mm_processor_kwargs={"budget": "untouched"}, max_tokens=1)
for budget in ("untouched", 0.3, 0.15):
    answer = ask(mm_processor_kwargs={"budget": budget}) if in_kwargs else ask(budget=budget)
    if "error" in answer:
        print(f"{budget}: {answer['error']['message']}")
        continue
    usage = answer["usage"]
    tokens = usage.get("image_tokens") or f"{usage['prompt_tokens']} tokens in the prompt"
    print(f"{budget}: {answer['choices'][0]['message']['content'].strip()!r}, {tokens}")
