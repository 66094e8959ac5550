//! Requests in, responses out: which path is what, and how much of a body is read.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use model::Source;
use model::tokenizer::TokenizerError::{ChatTemplate, NoChatTemplate, TextTooLong};
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use tokio::time::{timeout, timeout_at};

use super::engine::{Event, Queue, Refused, Usage};
use super::events::Events;
use super::request::{Asked, Defaults, Kind};
use super::response::{Head, Refusal, models};
use super::{Limits, stopped};
use crate::ParticipantError;
use crate::answer::{self, Finish, Prompt};
use crate::grammar::Spelling;

pub(super) struct Service {
    pub queue: Queue,
    pub models: Vec<String>,
    pub deadline: Option<Duration>,
    pub tokens_max: usize,
    pub seed: u64,
    pub limits: Limits,
    /// Only programs on this machine are meant: a page in its browser, which may get at it by a name of its own (DNS
    /// rebinding), is none of them.
    pub only_local: bool,
    /// How many have come.
    pub requests: AtomicU64,
    /// The model's tokenizer.
    pub source: Arc<dyn Source>,
    /// What its tokens spell, once somebody asks for an answer in a form.
    pub spelling: Arc<OnceLock<Spelling>>,
    /// Places for prompts that become tokens.
    pub encoding: Arc<Semaphore>,
    /// Turns true when answers are to end with what they have.
    pub closing: watch::Receiver<bool>,
}

type Answer = Response<Either<Full<Bytes>, Pieces>>;

impl Service {
    pub(super) async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Answer, Infallible> {
        let begun = Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let answer = self.route(request, begun).await;
        let answer = answer.unwrap_or_else(|refusal| refused(&refusal));
        // Paths are the peer's words: only known ones are repeated.
        let known = PATHS.into_iter().find(|known| *known == path).unwrap_or("another path");
        let (status, took_ms) = (answer.status().as_u16(), begun.elapsed().as_millis());
        tracing::info!("{method} {known}: {status} after {took_ms} ms");
        Ok(answer)
    }

    async fn route(&self, request: Request<Incoming>, begun: Instant) -> Result<Answer, Refusal> {
        if self.only_local && !names_this_machine(request.headers().get(HOST)) {
            let what = "the request is for another host; this server answers as localhost, 127.0.0.1 or [::1]";
            return Err(Refusal::new(StatusCode::FORBIDDEN, what));
        }
        let kind = match (request.uri().path(), request.method()) {
            (MODELS, &Method::GET) => return Ok(json(StatusCode::OK, &models(&self.models))),
            (CHAT, &Method::POST) => Kind::Chat,
            (TEXT, &Method::POST) => Kind::Text,
            (MODELS | CHAT | TEXT, _) => {
                let refusal =
                    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "models are asked for by GET, answers by POST");
                let mut answer = refused(&refusal);
                let allowed = if request.uri().path() == MODELS { "GET" } else { "POST" };
                answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
                return Ok(answer);
            }
            _ => return Err(Refusal::new(StatusCode::NOT_FOUND, format!("there are {}", PATHS.join(", ")))),
        };
        // A page of some other site can send a form or plain text here unasked, but not this type.
        let ty = request.headers().get(CONTENT_TYPE).and_then(|ty| ty.to_str().ok()).unwrap_or_default();
        if !ty.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let what = "the body's type is not application/json: set the header Content-Type";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, what));
        }
        let body = self.body(request.into_body()).await?;
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let defaults = Defaults {
            models: &self.models,
            deadline: self.deadline,
            tokens_max: self.tokens_max,
            seed: self.seed.wrapping_add(id),
            begun,
        };
        let Asked { mut request, model, stream, include_usage } = Asked::parse(kind, &body, &defaults)?;
        let place = self.queue.place().map_err(not_taken)?;
        let deadline = request.deadline;
        // Here and not by the engine, where other requests wait for it.
        let events = match self.encoded(&request).await? {
            Some(tokens) => {
                let count = tokens.len();
                request.prompt = Prompt::Tokens(tokens);
                let mut closing = self.closing.clone();
                let closing = async move { stopped(&mut closing).await };
                Events::new(self.queue.ask(place, request, begun).map_err(not_taken)?, deadline, count, closing)
            }
            None => return Ok(self.too_late(Head::new(kind, id, model), stream, include_usage)),
        };
        let head = Head::new(kind, id, model);
        match stream {
            true => self.streamed(head, include_usage, events).await,
            false => whole(head, events).await,
        }
    }

    /// The prompt's tokens, or none by the deadline.
    async fn encoded(&self, request: &answer::Request) -> Result<Option<Vec<u32>>, Refusal> {
        let tokens = async {
            let place = self.encoding.clone().acquire_owned().await.expect("the semaphore is never closed");
            let (source, prompt) = (self.source.clone(), request.prompt.clone());
            let spelling = request.grammar.is_some().then(|| self.spelling.clone());
            // Whoever does not wait for it any more, it takes its place until it is done.
            let work = move || {
                let _place = place;
                if let Some(spelling) = spelling {
                    spelling.get_or_init(|| Spelling::new(source.tokenizer()));
                }
                prompt.encode(&*source)
            };
            tokio::task::spawn_blocking(work).await
        };
        let joined = match request.deadline {
            None => tokens.await,
            Some(deadline) => match timeout_at(deadline.into(), tokens).await {
                Ok(joined) => joined,
                Err(_) => return Ok(None),
            },
        };
        let tokens = joined.unwrap_or(Err(ParticipantError::Panicked));
        tokens.map(Some).map_err(|error| failed(&error))
    }

    async fn body(&self, body: Incoming) -> Result<Bytes, Refusal> {
        let limit = self.limits.body_bytes;
        let too_long = || Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {limit} bytes"));
        // What is announced is not waited for.
        if body.size_hint().lower() > limit as u64 {
            return Err(too_long());
        }
        match timeout(self.limits.patience, Limited::new(body, limit).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_long()),
            Ok(Err(_)) => Err(Refusal::new(StatusCode::BAD_REQUEST, "the body ended early")),
            Err(_) => Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to come")),
        }
    }

    /// An answer piece by piece. What goes wrong before the first piece is a refusal like any other.
    async fn streamed(&self, head: Head, include_usage: bool, mut events: Events) -> Result<Answer, Refusal> {
        let first = events.next().await;
        if let Event::Failed(error) = &first {
            return Err(failed(error));
        }
        let mut ready = head.role().map(|role| data(&role)).unwrap_or_default();
        let last = push(&head, include_usage, first, &mut ready);
        Ok(stream_of(Pieces { head, include_usage, events: (!last).then_some(events), ready }))
    }

    /// An answer that was due before it had begun.
    fn too_late(&self, head: Head, stream: bool, include_usage: bool) -> Answer {
        if !stream {
            return json(StatusCode::OK, &head.whole("", Finish::Deadline, Usage::default()));
        }
        let mut ready = head.role().map(|role| data(&role)).unwrap_or_default();
        let last = Event::Finished { finish: Finish::Deadline, usage: Usage::default() };
        push(&head, include_usage, last, &mut ready);
        stream_of(Pieces { head, include_usage, events: None, ready })
    }
}

fn stream_of(pieces: Pieces) -> Answer {
    let answer = Response::builder()
        .header(CONTENT_TYPE, "text/event-stream")
        .header(CACHE_CONTROL, "no-cache")
        .body(Either::Right(pieces));
    answer.expect("headers of our own")
}

fn not_taken(refused: Refused) -> Refusal {
    match refused {
        Refused::Full => Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests wait; try again"),
        Refused::Ended => Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the engine has ended; restart the server"),
    }
}

const MODELS: &str = "/v1/models";
const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const PATHS: [&str; 3] = [MODELS, CHAT, TEXT];

async fn whole(head: Head, mut events: Events) -> Result<Answer, Refusal> {
    let mut all = String::new();
    loop {
        match events.next().await {
            Event::Begun { .. } => {}
            Event::Text { text, .. } => all.push_str(&text),
            Event::Finished { finish, usage } => {
                return Ok(json(StatusCode::OK, &head.whole(&all, finish, usage)));
            }
            Event::Failed(error) => return Err(failed(&error)),
        }
    }
}

/// An answer's events as server-sent ones.
pub(super) struct Pieces {
    head: Head,
    include_usage: bool,
    /// None behind the last.
    events: Option<Events>,
    /// What has not been sent.
    ready: String,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Self { head, include_usage, events, ready } = self.get_mut();
        while ready.is_empty() {
            let Some(open) = events else { return Poll::Ready(None) };
            let event = ready!(open.poll_next(context));
            if push(head, *include_usage, event, ready) {
                *events = None;
            }
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(std::mem::take(ready))))))
    }
}

/// Adds an event's data; whether it is the last.
fn push(head: &Head, include_usage: bool, event: Event, to: &mut String) -> bool {
    match event {
        Event::Begun { .. } => return false,
        Event::Text { text, .. } => {
            to.push_str(&data(&head.text(&text)));
            return false;
        }
        Event::Finished { finish, usage } => {
            to.push_str(&data(&head.end(finish)));
            if include_usage {
                to.push_str(&data(&head.usage(usage)));
            }
        }
        Event::Failed(error) => to.push_str(&data(&failed(&error).to_json())),
    }
    to.push_str("data: [DONE]\n\n");
    true
}

/// JSON has no line breaks outside of strings, and escapes them inside.
fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn json(status: StatusCode, value: &Value) -> Answer {
    let body = Either::Left(Full::new(Bytes::from(value.to_string())));
    let answer = Response::builder().status(status).header(CONTENT_TYPE, "application/json").body(body);
    answer.expect("headers of our own")
}

fn refused(refusal: &Refusal) -> Answer {
    let mut answer = json(refusal.status, &refusal.to_json());
    let headers = answer.headers_mut();
    match refusal.status {
        StatusCode::SERVICE_UNAVAILABLE => {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        // What is left of such a body is not worth reading.
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        _ => {}
    }
    answer
}

/// Whose fault it was decides the status.
fn failed(error: &ParticipantError) -> Refusal {
    match error {
        ParticipantError::Usage(what) => Refusal::invalid(None, what.clone()),
        // Messages that the model's template does not take. Which file of this machine it is in, is not for who asks.
        ParticipantError::Tokenizer(ChatTemplate { reason, .. }) => {
            Refusal::invalid(None, format!("chat template: {reason}"))
        }
        ParticipantError::Tokenizer(error @ (TextTooLong { .. } | NoChatTemplate)) => {
            Refusal::invalid(None, error.to_string())
        }
        _ => {
            // What a tokenizer says may name what it was given, which is never logged.
            match error {
                ParticipantError::Tokenizer(_) => tracing::error!("an answer failed: the tokenizer did"),
                error => tracing::error!(%error, "an answer failed"),
            }
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the engine failed; the server's log says why")
        }
    }
}

fn names_this_machine(host: Option<&HeaderValue>) -> bool {
    let Some(host) = host.and_then(|host| host.to_str().ok()) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_matches(['[', ']']).parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use model::tokenizer::TokenizerError::{Engine, UnknownId};

    use super::*;

    #[test]
    fn what_the_model_s_files_do_wrong_is_not_the_request_s_fault() {
        let told = |error| {
            let refusal = failed(&ParticipantError::Tokenizer(error));
            (refusal.status.as_u16(), refusal.to_json()["error"]["message"].as_str().unwrap().to_owned())
        };
        let template = told(ChatTemplate { place: "models/m.gguf".into(), reason: "roles must alternate".into() });
        assert_eq!(template, (400, "chat template: roles must alternate".into()));
        assert_eq!(told(TextTooLong { found: 9, limit: 8 }).0, 400);
        for error in [UnknownId { id: 7, vocabulary: 5 }, Engine("a word".into())] {
            assert_eq!(told(error), (500, "the engine failed; the server's log says why".into()));
        }
    }
}
