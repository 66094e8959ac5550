//! Chat templates: Jinja programs that come with a model and turn a conversation into text. They are programs from
//! outside, so they see the messages and nothing else, and they run on a budget of instructions that grows with the
//! conversation. The budget bounds how many instructions run, not how much memory one of them may ask for.

use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::TokenizerError;

const TEMPLATE_BYTES_MAX: usize = 64 << 10;
/// Real templates use 30 to 150 instructions per message.
const FUEL_PER_MESSAGE: u64 = 1_000;
const FUEL_BASE: u64 = 10_000;
const NAME: &str = "chat_template";

/// One turn of a conversation. Has no `Debug`, because text is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// "system", "user" or "assistant"; the template decides which roles exist.
    pub role: String,
    pub content: String,
}

pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    /// Where it is from, for errors.
    place: String,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    pub fn new(source: &str, place: &str, bos: Option<String>, eos: Option<String>) -> Result<Self, TokenizerError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            let reason = format!("it has {} bytes, more than the limit of {TEMPLATE_BYTES_MAX}", source.len());
            return Err(TokenizerError::ChatTemplate { place: place.to_owned(), reason });
        }
        let mut environment = Environment::new();
        // As transformers sets up its own engine.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source.to_owned()).map_err(failed(place))?;
        Ok(Self { environment, place: place.to_owned(), bos, eos })
    }

    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL_BASE + FUEL_PER_MESSAGE * messages.len() as u64));
        let messages: Vec<Value> = messages
            .iter()
            .map(|Message { role, content }| context! { role => role.as_str(), content => content.as_str() })
            .collect();
        let variables = context! {
            messages,
            add_generation_prompt,
            tools => (),
            documents => (),
            ..self.special_tokens()
        };
        let rendered = environment.get_template(NAME).and_then(|template| template.render(variables));
        rendered.map_err(failed(&self.place))
    }

    /// A token the model does not have stays undefined rather than being none, as templates expect.
    fn special_tokens(&self) -> Value {
        let named = [("bos_token", &self.bos), ("eos_token", &self.eos)];
        named.into_iter().filter_map(|(name, text)| Some((name, Value::from(text.as_deref()?)))).collect()
    }
}

fn failed(place: &str) -> impl FnOnce(Error) -> TokenizerError {
    move |error| TokenizerError::ChatTemplate { place: place.to_owned(), reason: error.to_string() }
}
