//! What a request's JSON asks for, checked field by field.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::tokenizer::Message;
use serde_json::{Map, Value};

use super::response::Refusal;
use crate::answer::{Prompt, Request};
use crate::grammar::Grammar;
use crate::sampler::Sampling;

/// The two kinds of completions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

pub(super) struct Asked {
    pub request: Request,
    /// As the request calls it.
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
}

/// Where requests say nothing.
pub(super) struct Defaults<'a> {
    /// By name; the first is the model without an adapter.
    pub models: &'a [String],
    pub deadline: Option<Duration>,
    pub tokens_max: usize,
    pub seed: u64,
    /// When the request came.
    pub begun: Instant,
}

const TOKENS_MAX: u64 = 1 << 20;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const MESSAGES_MAX: usize = 1024;
const DEADLINE_MS_MAX: f64 = 3_600_000.0;

/// Fields of OpenAI's interface, and of llama.cpp's, that change an answer and are not supported, with the values that ask
/// for nothing.
const UNSUPPORTED: &[(&str, AsksNothing)] = &[
    ("n", |value| value == 1),
    ("n_cmpl", |value| value == 1),
    ("best_of", |value| value == 1),
    ("echo", |value| value == false),
    ("suffix", |value| value == ""),
    ("logprobs", |value| value == false),
    ("top_logprobs", is_zero),
    ("n_probs", is_zero),
    ("frequency_penalty", is_zero),
    ("presence_penalty", is_zero),
    ("logit_bias", |value| is_empty_list(value) || is_empty_object(value)),
    ("modalities", |value| *value == serde_json::json!(["text"])),
    ("audio", |_| false),
    // An empty object asks for a search.
    ("web_search_options", |_| false),
    ("tools", is_empty_list),
    // Without tools there is nothing to choose from.
    ("tool_choice", |value| value == "none" || value == "auto"),
    ("functions", is_empty_list),
    ("function_call", |value| value == "none"),
    ("grammar", |value| value == ""),
    // An empty schema asks for JSON.
    ("json_schema", |_| false),
    ("ignore_eos", |value| value == false),
    ("mirostat", is_zero),
    ("typical_p", |value| value.as_f64() == Some(1.0)),
    ("dynatemp_range", is_zero),
    ("dry_multiplier", is_zero),
    ("xtc_probability", is_zero),
    ("top_n_sigma", is_zero_or_less),
    ("adaptive_target", |value| value.as_f64().is_some_and(|target| target < 0.0)),
    ("min_keep", is_zero),
    ("n_indent", is_zero),
    // All tokens count.
    ("repeat_last_n", |value| value == -1),
    ("samplers", |value| value == "" || is_empty_list(value)),
    ("t_max_predict_ms", is_zero_or_less),
    ("t_max_prompt_ms", is_zero_or_less),
    ("lora", is_empty_list),
    ("response_fields", is_empty_list),
    ("return_tokens", |value| value == false),
    ("chat_template_kwargs", is_empty_object),
    ("generation_prompt", |value| value == ""),
    ("add_generation_prompt", |value| value == true),
    ("continue_final_message", |value| value == false),
];

/// Fields of the same interfaces that change no answer here, whatever they say: notes for who keeps books, hints about speed
/// and effort, and details of what is refused above.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "service_tier",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
    "parallel_tool_calls",
    "parse_tool_calls",
    "reasoning_format",
    "reasoning_control",
    "cache_prompt",
    "n_cache_reuse",
    "n_keep",
    "n_discard",
    "id_slot",
    "timings_per_token",
    "return_progress",
    "sse_ping_interval",
    "backend_sampling",
    "post_sampling_probs",
    "mirostat_tau",
    "mirostat_eta",
    "dynatemp_exponent",
    "xtc_threshold",
    "adaptive_decay",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
];

/// What [`Asked::parse`] reads.
const READ: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "max_completion_tokens",
    "max_tokens",
    "n_predict",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "repeat_penalty",
    "seed",
    "deadline_ms",
    "stop",
    "response_format",
    "stream",
    "stream_options",
];

type AsksNothing = fn(&Value) -> bool;

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_empty_object(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_zero_or_less(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number <= 0.0)
}

impl Asked {
    pub(super) fn parse(kind: Kind, body: &[u8], defaults: &Defaults<'_>) -> Result<Self, Refusal> {
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            let told = error.to_string();
            // It is JSON all the same, which has no largest number.
            let what = match told.starts_with("number out of range") {
                true => format!("the body has a {told}; give one that is nearer to 0"),
                false => format!("the body is not JSON: {told}"),
            };
            Refusal::invalid(None, what)
        })?;
        let Value::Object(fields) = value else {
            return Err(Refusal::invalid(None, "the body is JSON, but no object".into()));
        };
        let fields = Fields(fields);
        for &(name, asks_nothing) in UNSUPPORTED {
            if fields.get(name).is_some_and(|value| !asks_nothing(value)) {
                let instead = match name {
                    "json_schema" | "grammar" => "say it as `response_format`, or leave it out",
                    "t_max_predict_ms" | "t_max_prompt_ms" => "say it as `deadline_ms`, or leave it out",
                    "lora" => "name an adapter as `model`, or leave it out",
                    _ => "leave it out",
                };
                return Err(Refusal::invalid(Some(name), format!("`{name}` is not supported; {instead}")));
            }
        }
        fields.check_names()?;
        let model = fields.string("model")?.ok_or_else(|| missing("model"))?.to_owned();
        let place = defaults.models.iter().position(|known| *known == model);
        let place = place.ok_or_else(|| Refusal::unknown_model(&model, defaults.models))?;
        let prompt = match kind {
            Kind::Chat => Prompt::Chat(fields.messages()?),
            Kind::Text => Prompt::Text(fields.prompt()?),
        };
        // The last is llama.cpp's name.
        let mut tokens_max = None;
        for name in ["max_completion_tokens", "max_tokens", "n_predict"] {
            tokens_max = tokens_max.or(fields.whole(name, TOKENS_MAX)?);
        }
        let repetition_penalty = fields.number("repetition_penalty")?.or(fields.number("repeat_penalty")?);
        let sampling = Sampling {
            temperature: fields.number("temperature")?.unwrap_or(1.0),
            top_k: fields.whole("top_k", TOKENS_MAX)?.unwrap_or(0) as usize,
            top_p: fields.number("top_p")?.unwrap_or(1.0),
            min_p: fields.number("min_p")?.unwrap_or(0.0),
            repetition_penalty: repetition_penalty.unwrap_or(1.0),
            seed: fields.seed()?.unwrap_or(defaults.seed),
        };
        let field = |message: &str| message.split(' ').next().unwrap_or_default().to_owned();
        sampling.check().map_err(|error| {
            let message = error.to_string();
            Refusal::invalid(Some(&field(&message)), message)
        })?;
        let deadline = match fields.number("deadline_ms")? {
            Some(ms) if ms > 0.0 && ms <= DEADLINE_MS_MAX => Some(Duration::from_secs_f64(ms / 1e3)),
            Some(_) => {
                // A number as JSON has it: others are written with hundreds of digits.
                let ms = &fields.0["deadline_ms"];
                let what = format!("deadline_ms is {ms}; give more than 0 and at most {DEADLINE_MS_MAX}");
                return Err(Refusal::invalid(Some("deadline_ms"), what));
            }
            None => defaults.deadline,
        };
        let request = Request {
            prompt,
            tokens_max: tokens_max.map_or(defaults.tokens_max, |tokens| tokens as usize),
            sampling,
            stops: fields.stops()?,
            deadline: deadline.map(|deadline| defaults.begun + deadline),
            adapter: place.checked_sub(1),
            grammar: fields.grammar()?.map(Arc::new),
        };
        let include_usage = fields.get("stream_options").is_some_and(|options| options["include_usage"] == true);
        Ok(Self { request, model, stream: fields.truth("stream")?.unwrap_or(false), include_usage })
    }
}

struct Fields(Map<String, Value>);

fn missing(name: &str) -> Refusal {
    Refusal::invalid(Some(name), format!("`{name}` is missing"))
}

fn wrong(name: &str, expected: &str) -> Refusal {
    Refusal::invalid(Some(name), format!("`{name}` is not {expected}"))
}

impl Fields {
    /// What nobody knows is not ignored: a misspelt limit would be none.
    fn check_names(&self) -> Result<(), Refusal> {
        let known = |name: &str| {
            let unsupported = || UNSUPPORTED.iter().any(|(known, _)| *known == name);
            READ.contains(&name) || WITHOUT_EFFECT.contains(&name) || unsupported()
        };
        match self.0.keys().find(|name| !known(name)) {
            Some(name) => {
                let name = &name[..name.floor_char_boundary(64)];
                let what = format!("`{name}` is no field of this interface; check its spelling, or leave it out");
                Err(Refusal::invalid(Some(name), what))
            }
            None => Ok(()),
        }
    }

    /// None where it is null as well.
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn string(&self, name: &str) -> Result<Option<&str>, Refusal> {
        let value = self.get(name).map(|value| value.as_str().ok_or_else(|| wrong(name, "a string")));
        value.transpose()
    }

    fn truth(&self, name: &str) -> Result<Option<bool>, Refusal> {
        self.get(name).map(|value| value.as_bool().ok_or_else(|| wrong(name, "true or false"))).transpose()
    }

    fn number(&self, name: &str) -> Result<Option<f64>, Refusal> {
        self.get(name).map(|value| value.as_f64().ok_or_else(|| wrong(name, "a number"))).transpose()
    }

    fn whole(&self, name: &str, max: u64) -> Result<Option<u64>, Refusal> {
        let value = |value: &Value| {
            let whole = value.as_u64().filter(|&whole| whole <= max);
            whole.ok_or_else(|| wrong(name, &format!("a whole number of 0 to {max}")))
        };
        self.get(name).map(value).transpose()
    }

    /// Any whole number: negative ones have a seed of their own. -1 is one of them, as for OpenAI, and asks for no other seed
    /// each time, as it does of llama.cpp: who wants that gives none.
    fn seed(&self) -> Result<Option<u64>, Refusal> {
        let seed = |value: &Value| value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
        self.get("seed").map(|value| seed(value).ok_or_else(|| wrong("seed", "a whole number"))).transpose()
    }

    fn stops(&self) -> Result<Vec<String>, Refusal> {
        let stops: Vec<&str> = match self.get("stop") {
            None => return Ok(Vec::new()),
            Some(Value::String(stop)) => vec![stop],
            Some(Value::Array(stops)) => {
                let all: Option<_> = stops.iter().map(Value::as_str).collect();
                all.ok_or_else(|| wrong("stop", "a string or a list of strings"))?
            }
            Some(_) => return Err(wrong("stop", "a string or a list of strings")),
        };
        // An empty one would end every answer before it begins.
        let fit = stops.iter().all(|stop| (1..=STOP_BYTES_MAX).contains(&stop.len()));
        if stops.len() > STOPS_MAX || !fit {
            let expected = format!("a string of 1 to {STOP_BYTES_MAX} bytes, or a list of at most {STOPS_MAX} of them");
            return Err(wrong("stop", &expected));
        }
        Ok(stops.into_iter().map(str::to_owned).collect())
    }

    /// OpenAI's `response_format`, and llama.cpp's: a `schema` beside the type `json_object`.
    fn grammar(&self) -> Result<Option<Grammar>, Refusal> {
        let name = "response_format";
        let Some(format) = self.get(name) else { return Ok(None) };
        let grammar = match format["type"].as_str() {
            Some("text") => {
                check_known(format, &["type"])?;
                return Ok(None);
            }
            Some("json_object") => {
                check_known(format, &["type", "schema"])?;
                format.get("schema").map_or_else(|| Ok(Grammar::object()), Grammar::schema)
            }
            Some("json_schema") => {
                check_known(format, &["type", "json_schema"])?;
                let named = &format["json_schema"];
                check_known(named, &["name", "description", "strict", "schema"])?;
                let Some(schema) = named.get("schema").filter(|schema| !schema.is_null()) else {
                    let what = "`response_format` has no `json_schema` with a `schema`; give one, or json_object";
                    return Err(Refusal::invalid(Some(name), what.into()));
                };
                Grammar::schema(schema)
            }
            _ => return Err(wrong(name, "of the type text, json_object or json_schema")),
        };
        grammar.map(Some).map_err(|error| Refusal::invalid(Some(name), error.to_string()))
    }

    fn prompt(&self) -> Result<String, Refusal> {
        match self.get("prompt") {
            None => Err(missing("prompt")),
            Some(Value::String(prompt)) => Ok(prompt.clone()),
            Some(Value::Array(prompts)) => match &prompts[..] {
                [Value::String(prompt)] => Ok(prompt.clone()),
                _ => Err(wrong("prompt", "one string")),
            },
            Some(_) => Err(wrong("prompt", "a string")),
        }
    }

    fn messages(&self) -> Result<Vec<Message>, Refusal> {
        let messages = self.get("messages").ok_or_else(|| missing("messages"))?;
        let messages = messages.as_array().ok_or_else(|| wrong("messages", "a list"))?;
        if messages.is_empty() || messages.len() > MESSAGES_MAX {
            return Err(wrong("messages", &format!("a list of 1 to {MESSAGES_MAX} messages")));
        }
        messages.iter().map(message).collect()
    }
}

/// What is not known in an answer's form is not ignored: the answer would have another one.
fn check_known(format: &Value, known: &[&str]) -> Result<(), Refusal> {
    let mut keys = format.as_object().into_iter().flat_map(Map::keys);
    match keys.find(|key| !known.contains(&key.as_str())) {
        Some(key) => {
            let (key, known) = (&key[..key.floor_char_boundary(64)], known.join(", "));
            let what = format!("`response_format`: `{key}` is not known here, only {known}; leave it out");
            Err(Refusal::invalid(Some("response_format"), what))
        }
        None => Ok(()),
    }
}

fn message(value: &Value) -> Result<Message, Refusal> {
    let role = match value["role"].as_str() {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        _ => return Err(wrong("messages", "a list of messages whose `role` is system, user or assistant")),
    };
    let content = match &value["content"] {
        Value::String(content) => Some(content.clone()),
        Value::Array(parts) => {
            let text = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_owned);
            parts.iter().map(text).collect::<Option<Vec<String>>>().map(|parts| parts.concat())
        }
        _ => None,
    };
    let content = content.ok_or_else(|| wrong("messages", "a list of messages whose `content` is text"))?;
    Ok(Message { role: role.into(), content })
}
