"""/tokenize, /detokenize and /tokenizer_info, with the fake engine's own tokens."""

from __future__ import annotations

from serving.engine.fake import plan, tokens
from serving.engine.fake.engine import Engine
from serving.engine.fake.exchange import Exchange
from serving.engine.fake.protocol import DetokenizeRequest, TokenizeRequest, invalid, parse

# The answer to GET /tokenizer_info. Control tokens have no text: no prompt can hold one.
TOKENIZER_INFO = {"tokenizer_class": "FakeTokenizer", "bos_token": None, "eos_token": None, "name_or_path": "/fake"}


async def tokenize(engine: Engine, exchange: Exchange) -> None:
    """POST /tokenize: exactly the prompt that generation would use."""
    request = parse(TokenizeRequest, await exchange.body())
    engine.check_model(request)
    if request.messages is not None:
        prompt = plan.render_chat(request.messages)
    elif request.prompt is not None:
        prompt = plan.render_prompt(request.prompt, add_special_tokens=request.add_special_tokens)
    else:
        raise invalid("missing", ["prompt"], "Field required")
    ids = tokens.token_ids(prompt)
    shown = [tokens.decode(tokens.encode_ids([i])) for i in ids] if request.return_token_strs else None
    await exchange.json({"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, "token_strs": shown})


async def detokenize(engine: Engine, exchange: Exchange) -> None:
    """POST /detokenize."""
    request = parse(DetokenizeRequest, await exchange.body())
    engine.check_model(request)
    await exchange.json({"prompt": tokens.decode(tokens.encode_ids(request.tokens))})
