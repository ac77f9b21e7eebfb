"""POST /tokenize and /detokenize, with vLLM's bodies."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.chat import chat_prompt
from lightning_llm.serving.server.http.conversation import ToolStyle
from lightning_llm.serving.server.http.documentation import as_json
from lightning_llm.serving.server.http.limits import ParsedRoute, off_loop
from lightning_llm.serving.server.http.requests import DetokenizeRequest, TokenizeRequest
from lightning_llm.serving.server.http.responses import DetokenizeResponse, TokenizeResponse
from lightning_llm.serving.server.http.service import Service


def token_routes(service: Service, style: ToolStyle) -> APIRouter:
    """The router."""
    router = APIRouter(route_class=ParsedRoute)

    @router.post("/tokenize", response_model=TokenizeResponse)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Give prompt or messages, one of them.", param="prompt")
        if body.messages is not None:
            ids = await chat_prompt(
                service,
                style,
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                variables=body.chat_template_kwargs,
            )
        else:
            ids = await service.prompts.encode(body.prompt or "", "prompt", add_special_tokens=body.add_special_tokens)

        def answer() -> Response:
            told = TokenizeResponse(count=len(ids), max_model_len=service.client.max_model_len, tokens=ids)
            if body.return_token_strs:
                spell = service.client.tokenizer.token_bytes
                texts = {token: spell(token).decode("utf-8", errors="replace") for token in set(ids)}
                told.token_strs = [texts[token] for token in ids]
            return as_json(told)

        return await off_loop(len(ids), answer)

    @router.post("/detokenize", response_model=DetokenizeResponse)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        service.check_model(body.model)
        service.prompts.check_ids(body.tokens, "tokens")
        decode = service.client.tokenizer.decode
        skip = body.skip_special_tokens

        def answer() -> Response:
            return as_json(DetokenizeResponse(prompt=decode(body.tokens, skip_special_tokens=skip)))

        return await off_loop(len(body.tokens), answer)

    return router
