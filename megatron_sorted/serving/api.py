"""OpenAI's completions and chat endpoints over a worker, for existing clients."""

import asyncio
import uuid
from collections.abc import Callable

from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from megatron_sorted.decoding.strategies import SamplingParameters, Strategy
from megatron_sorted.decoding.text_generator import TextGenerator
from megatron_sorted.decoding.texts import check_prompts
from megatron_sorted.errors import SortedError
from megatron_sorted.serving.answers import (
    AsciiResponse,
    RefusedError,
    error_response,
    response_to_error,
)
from megatron_sorted.serving.body import MAX_PROMPTS, max_body_bytes, parse_body, read_body
from megatron_sorted.serving.completion import CompletionResponse
from megatron_sorted.serving.connections import cancel_on_disconnect, outputs_of
from megatron_sorted.serving.job import Job
from megatron_sorted.serving.keys import ApiKeys
from megatron_sorted.serving.metrics import Metrics
from megatron_sorted.serving.models import ServedModels
from megatron_sorted.serving.page import page_response
from megatron_sorted.serving.prompts import PromptEncoder, read_prompts
from megatron_sorted.serving.request_log import RecordRequests, RequestRecord, log_request
from megatron_sorted.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Kind,
    StreamOptions,
    TextRequest,
    read_request,
    read_stop_sequences,
)
from megatron_sorted.serving.token_logprobs import Scoring
from megatron_sorted.serving.turns import read_messages
from megatron_sorted.serving.usage import Usage
from megatron_sorted.serving.worker import GenerationWorker

DEFAULT_TOKENS = 256
DEFAULT_SAMPLING = SamplingParameters(temperature=1.0)
MAX_TURNS = 4096
OPEN_PATHS = ("/", "/health", "/metrics")
"""Paths that need no key: they hold nothing of prompts, texts and clients."""


def make_app(
    worker: GenerationWorker,
    name: str,
    strategy_of: Callable[[str | None], Strategy | None],
    defaults: SamplingParameters = DEFAULT_SAMPLING,
    keys: ApiKeys | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        worker: The owner of the model.
        name: The model's name for clients.
        strategy_of: Maps a request's strategy to an object: None to the server's own; returns None
            where the worker is to choose.
        defaults: The sampling parameters for what a request does not set.
        keys: The keys of clients; by default every client is served.
    """
    keys = keys or ApiKeys()

    async def check_key(request: Request) -> None:
        if request.url.path not in OPEN_PATHS:
            request.state.record.owner = keys.owner(request.headers.get("authorization"))

    app = FastAPI(
        title="megatron_sorted",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        default_response_class=AsciiResponse,
        dependencies=[Depends(check_key)],
    )
    generator, metrics = worker.generator, Metrics(worker)
    network = generator.network
    max_bytes, most_tokens = max_body_bytes(network), network.max_positions
    models, encoder = ServedModels(name, network, strategy_of), PromptEncoder(generator)

    def ended(record: RequestRecord) -> None:
        metrics.observe(record)
        log_request(record)

    app.add_middleware(RecordRequests, ended=ended)

    @app.exception_handler(SortedError)
    async def refused(_: Request, error: SortedError) -> Response:
        return response_to_error(error, None)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        return error_response(
            f"{request.method} {request.url.path[:200]}: {error.detail}.", None, error.status_code
        )

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # the framework wants one, though no client receives it

    app.get("/")(page_response)
    app.get("/metrics")(metrics.response)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def all_models() -> dict:
        return {"object": "list", "data": models.entries()}

    @app.get("/v1/models/{requested:path}")
    async def one_model(requested: str) -> dict:
        return models.entry(requested)

    @app.get("/v1/adaptation")
    async def adaptation():
        if worker.adaptation is None:
            return error_response(
                "adaptation: this server does not choose strategies. Start it with --adapt.",
                None,
                404,
            )
        names = [strategy.name for strategy in worker.adaptation.strategies]
        return {
            "object": "adaptation",
            "strategies": names,
            "ways": names,  # the key of 0.6.0, for its clients
            "tasks": worker.adaptation.learned,
        }

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await requested_of(CompletionRequest, request)
        prompts = read_prompts(body.prompt, MAX_PROMPTS, most_tokens, network.vocab_size)
        ids = await encoder.encode(prompts)
        echoes = [
            (prompt if isinstance(prompt, str) else generator.tokenizer.decode(prompt))
            if body.echo
            else ""
            for prompt in prompts
        ]
        response = CompletionResponse("text_completion", body.model or name, echoes)
        return await answer(body, request, job_of(body, ids, "prompt"), response)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await requested_of(ChatRequest, request)
        ids = await encoder.encode_chat(read_messages(body.messages, min(most_tokens, MAX_TURNS)))
        response = CompletionResponse("chat.completion", body.model or name, [""])
        return await answer(body, request, job_of(body, ids, "messages"), response)

    async def requested_of(kind: type[Kind], request: Request) -> Kind:
        """Return a request's checked body."""
        values = parse_body(
            await read_body(request, max_bytes), request.headers.get("content-type", "")
        )
        body = read_request(kind, values)
        if body.model is not None:
            models.check(body.model)
        return body

    def job_of(body: TextRequest, ids: list[list[int]], field: str) -> Job:
        """Build the job of a request whose prompts are encoded."""
        longest = max(map(len, ids))
        room = most_tokens - longest
        if room < 1 and body.max_tokens != 0:
            raise RefusedError(
                f"{field}: {longest} tokens fill the model's context of {most_tokens}. Shorten it.",
                field,
            )
        check_prompts(ids, network, 0)
        seed = body.seed if body.seed is not None else uuid.uuid4().int % (1 << 31)
        num_top = body.num_top_logprobs
        return Job(
            [prompt for prompt in ids for _ in range(body.n)],
            models.strategy(body),
            body.sampling(defaults, seed),
            min(DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, room),
            read_stop_sequences(body.stop),
            body.task,
            None if num_top is None else Scoring(num_top, getattr(body, "echo", False)),
        )

    async def answer(
        body: TextRequest, request: Request, job: Job, response: CompletionResponse
    ) -> Response:
        record: RequestRecord = request.state.record
        job.id, job.tenant = record.id, record.owner
        usage = Usage(job, sum(map(len, job.prompts[:: body.n])))
        outputs = outputs_of(job, usage.add)
        worker.submit(job)
        record.usage = usage
        response.begin(body.n, usage)
        field = "messages" if response.is_chat else "prompt"
        if body.stream:
            return StreamingResponse(
                response.stream(outputs, field, body.stream_options or StreamOptions()),
                media_type="text/event-stream",
            )
        watch = asyncio.create_task(cancel_on_disconnect(request, job))
        try:
            async for output in outputs:
                if isinstance(output, list):
                    response.scores = output
                else:
                    response.add(output)
        except Exception as error:  # the client gets it, and the server continues
            return response_to_error(error, field)
        finally:
            record.has_left = watch.done()
            watch.cancel()
        return AsciiResponse(response.complete())

    return app


def served_name(generator: TextGenerator, given: str | None) -> str:
    """Return the model's name for clients: the given one, else the name of its directory."""
    return (
        given
        or str(getattr(generator.network.model.config, "_name_or_path", "") or "model")
        .rstrip("/")
        .rsplit("/", 1)[-1]
    )
