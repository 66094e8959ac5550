//! What goes back: answers, their pieces, and refusals, in OpenAI's forms.

use std::time::{SystemTime, UNIX_EPOCH};

use hyper::StatusCode;
use serde_json::{Value, json};

use super::engine::Usage;
use super::request::Kind;
use crate::answer::Finish;

/// What a request did wrong, or the server could not do.
pub(super) struct Refusal {
    pub status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    pub(super) fn invalid(param: Option<&str>, message: String) -> Self {
        Self { param: param.map(str::to_owned), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    pub(super) fn unknown_model(name: &str, models: &[String]) -> Self {
        let shown: String = name.chars().take(64).collect();
        let message = format!("there is no model `{shown}`; there are: {}", models.join(", "));
        let code = Some("model_not_found");
        Self { param: Some("model".into()), code, ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    pub(super) fn to_json(&self) -> Value {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

/// What every piece of an answer says.
pub(super) struct Head {
    pub kind: Kind,
    pub id: u64,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
}

impl Head {
    pub(super) fn new(kind: Kind, id: u64, model: String) -> Self {
        Self { kind, id, created: now(), model }
    }

    pub(super) fn whole(&self, text: &str, finish: Finish, usage: Usage) -> Value {
        let (object, choice) = match self.kind {
            Kind::Chat => ("chat.completion", json!({"message": {"role": "assistant", "content": text}})),
            Kind::Text => ("text_completion", json!({"text": text})),
        };
        self.piece(object, Some((choice, Some(finish))), Some(usage))
    }

    /// The first piece of a chat has a role, the others have text.
    pub(super) fn role(&self) -> Option<Value> {
        let choice = json!({"delta": {"role": "assistant", "content": ""}});
        (self.kind == Kind::Chat).then(|| self.piece(self.streamed(), Some((choice, None)), None))
    }

    pub(super) fn text(&self, text: &str) -> Value {
        let choice = match self.kind {
            Kind::Chat => json!({"delta": {"content": text}}),
            Kind::Text => json!({"text": text}),
        };
        self.piece(self.streamed(), Some((choice, None)), None)
    }

    pub(super) fn end(&self, finish: Finish) -> Value {
        let choice = match self.kind {
            Kind::Chat => json!({"delta": {}}),
            Kind::Text => json!({"text": ""}),
        };
        self.piece(self.streamed(), Some((choice, Some(finish))), None)
    }

    pub(super) fn usage(&self, usage: Usage) -> Value {
        self.piece(self.streamed(), None, Some(usage))
    }

    fn streamed(&self) -> &'static str {
        match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        }
    }

    fn piece(&self, object: &str, choice: Option<(Value, Option<Finish>)>, usage: Option<Usage>) -> Value {
        let prefix = if self.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let choices: Vec<Value> = choice
            .into_iter()
            .map(|(mut choice, finish)| {
                choice["index"] = json!(0);
                choice["logprobs"] = Value::Null;
                // OpenAI knows two reasons; the exact one stands beside it.
                choice["finish_reason"] = json!(finish.map(|finish| match finish {
                    Finish::Ended | Finish::Stopped => "stop",
                    Finish::Length | Finish::Context | Finish::Deadline | Finish::Shutdown => "length",
                }));
                if let Some(finish) = finish {
                    choice["finish_detail"] = json!(finish.name());
                }
                choice
            })
            .collect();
        let mut piece = json!({
            "id": format!("{prefix}-{}", self.id), "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        });
        if let Some(Usage { prompt_tokens, cached_tokens, tokens }) = usage {
            piece["usage"] = json!({
                "prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens,
                "prompt_tokens_details": {"cached_tokens": cached_tokens},
            });
        }
        piece
    }
}

pub(super) fn models(names: &[String]) -> Value {
    let created = now();
    let model = |name: &String| json!({"id": name, "object": "model", "created": created, "owned_by": "headwater"});
    json!({"object": "list", "data": names.iter().map(model).collect::<Vec<_>>()})
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
