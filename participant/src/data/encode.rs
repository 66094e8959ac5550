//! Records as token [`Sequence`]s that say which tokens are trained.
//!
//! Text trains every token, a pair only its completion, a conversation only what the assistant says; the end token
//! belongs to what it ends. Token 0 is never trained, for nothing stands before it to predict it from. The tokenizer and
//! its chat template are behind [`TextEncoder`]: this module knows neither vocabularies nor templates.

use std::fmt;

use super::{Content, DataError, Message, Record};

/// A tokenizer with its chat template.
///
/// A record is encoded in pieces whose tokens are joined, so that training cuts it where generation does: after the
/// prompt. `encode` therefore adds nothing of its own, neither a token nor a space.
pub trait TextEncoder {
    /// The tokens of one piece of text. Special tokens spelled out in it (a template's, for instance) count as such.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String>;
    /// The conversation as the chat template writes it, up to where the assistant would begin if asked for.
    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String>;
    /// The token to put before a text, of tokenizers that want one there. Chat templates write their own.
    fn bos(&self) -> Option<u32>;
    /// The token that ends a text, a completion or an assistant's turn.
    fn eos(&self) -> Option<u32>;
}

/// At least two tokens, of which at least one is trained, but not the first.
#[derive(Clone, PartialEq, Eq)]
pub struct Sequence {
    tokens: Vec<u32>,
    trained: Vec<bool>,
}

impl Sequence {
    /// `None` where nothing would be trained. The first token's mark is dropped.
    ///
    /// # Panics
    /// If there is not one mark per token.
    pub fn new(tokens: Vec<u32>, mut trained: Vec<bool>) -> Option<Self> {
        assert_eq!(tokens.len(), trained.len(), "one mark per token");
        *trained.first_mut()? = false;
        trained.contains(&true).then_some(Self { tokens, trained })
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether token i is to be predicted from the tokens before it.
    pub fn trained(&self) -> &[bool] {
        &self.trained
    }
}

/// Sequences in their records' order.
#[derive(Debug, Default)]
pub struct Encoded {
    pub sequences: Vec<Sequence>,
    /// Records that are longer than a sequence may be: texts and conversations are divided, pairs lose what does not fit.
    pub cut: usize,
}

/// The sequences of all records, in order.
pub fn encode_records(
    records: &[Record],
    encoder: &dyn TextEncoder,
    sequence_tokens_max: u32,
) -> Result<Encoded, DataError> {
    let mut all = Encoded::default();
    for record in records {
        let Encoded { sequences, cut } = encode_record(record, encoder, sequence_tokens_max)?;
        all.sequences.extend(sequences);
        all.cut += cut;
    }
    Ok(all)
}

/// The sequences of one record: none if nothing in it is trained, several if it is long and not a pair.
pub fn encode_record(
    record: &Record,
    encoder: &dyn TextEncoder,
    sequence_tokens_max: u32,
) -> Result<Encoded, DataError> {
    let tokens_max = sequence_tokens_max as usize;
    let encoded = match tokens_max {
        0 | 1 => Err(format!("sequence_tokens_max = {tokens_max} leaves nothing to predict; set at least 2")),
        _ => match &record.content {
            Content::Text(text) => encode_text(text, encoder).map(|marked| marked.windows(tokens_max)),
            Content::Pair { prompt, completion } => encode_pair(prompt, completion, encoder, tokens_max),
            Content::Conversation(messages) => {
                encode_conversation(messages, encoder).map(|marked| marked.windows(tokens_max))
            }
        },
    };
    encoded.map_err(|reason| DataError::Encode { line: record.line, reason })
}

fn encode_text(text: &str, encoder: &dyn TextEncoder) -> Result<Marked, String> {
    let mut marked = Marked::default();
    marked.push(encoder.bos(), false);
    marked.push(encoder.encode(text)?, true);
    marked.push(encoder.eos(), true);
    Ok(marked)
}

/// One sequence at most. A pair that is too long loses the beginning of its prompt and the end of its completion, and
/// neither loses anything while it fills less than half of the sequence.
fn encode_pair(
    prompt: &str,
    completion: &str,
    encoder: &dyn TextEncoder,
    tokens_max: usize,
) -> Result<Encoded, String> {
    let prompt = encoder.encode(prompt)?;
    let mut completion = encoder.encode(completion)?;
    completion.extend(encoder.eos());

    let bos = encoder.bos();
    let bos_tokens = usize::from(bos.is_some());
    let context_tokens = bos_tokens + prompt.len();
    // At least one token of each that has any: tokens_max is 2 or more.
    let completion_tokens = completion.len().min(tokens_max - context_tokens.min(tokens_max / 2));
    let prompt_tokens = (context_tokens.min(tokens_max - completion_tokens)).saturating_sub(bos_tokens);

    let cut = prompt_tokens < prompt.len() || completion_tokens < completion.len();
    let mut marked = Marked::default();
    marked.push(bos, false);
    marked.push(prompt[prompt.len() - prompt_tokens..].iter().copied(), false);
    marked.push(completion.into_iter().take(completion_tokens), true);
    let sequences = Sequence::new(marked.tokens, marked.trained).into_iter().collect();
    Ok(Encoded { sequences, cut: usize::from(cut) })
}

/// Finds what the assistant says by rendering ever longer beginnings of the conversation. This works for a template
/// under which each beginning stays as it is when more is said, and refuses any other.
fn encode_conversation(messages: &[Message], encoder: &dyn TextEncoder) -> Result<Marked, String> {
    let whole = encoder.chat(messages, false)?;
    let mut marked = Marked::default();
    let mut done_bytes = 0;
    for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        let asked = encoder.chat(&messages[..index], true)?;
        let answered = encoder.chat(&messages[..=index], false)?;
        let (start, end) = (asked.len(), answered.len());
        if !(answered.starts_with(&asked) && whole.starts_with(&answered) && done_bytes <= start && start < end) {
            return Err(format!(
                "the chat template writes message {index} differently once more messages follow, so what is to be \
                 trained cannot be told apart; use prompt and completion, or another template"
            ));
        }
        marked.push(encoder.encode(&whole[done_bytes..start])?, false);

        let turn = encoder.encode(&whole[start..end])?;
        // Templates put a line break after the end token; generation stops before it, so it is not trained. A template
        // without an end token ends a turn by its last characters, whatever they are.
        let ending = encoder.eos().and_then(|eos| turn.iter().rposition(|token| *token == eos));
        let (said, rest) = turn.split_at(ending.map_or(turn.len(), |position| position + 1));
        marked.push(said.iter().copied(), true);
        marked.push(rest.iter().copied(), false);
        done_bytes = end;
    }
    marked.push(encoder.encode(&whole[done_bytes..])?, false);
    Ok(marked)
}

/// Tokens and marks on the way to sequences.
#[derive(Default)]
struct Marked {
    tokens: Vec<u32>,
    trained: Vec<bool>,
}

impl Marked {
    fn push(&mut self, tokens: impl IntoIterator<Item = u32>, trained: bool) {
        self.tokens.extend(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }

    /// Cuts into sequences of at most `tokens_max`. Each begins with the last token of the one before, so that no token
    /// goes untrained for standing first.
    fn windows(self, tokens_max: usize) -> Encoded {
        let len = self.tokens.len();
        let starts = (0..len.saturating_sub(1)).step_by(tokens_max - 1);
        let windows = starts.map(|start| start..len.min(start + tokens_max));
        let sequences = windows
            .filter_map(|window| Sequence::new(self.tokens[window.clone()].to_vec(), self.trained[window].to_vec()))
            .collect();
        Encoded { sequences, cut: usize::from(len > tokens_max) }
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trained = self.trained.iter().filter(|trained| **trained).count();
        write!(f, "Sequence({} tokens, {trained} trained)", self.tokens.len())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const BOS: u32 = 1;
    const EOS: u32 = 2;

    #[test]
    fn text_trains_every_token_but_the_first() {
        check_marks(Content::Text("abc".into()), &Bytes::default(), 16, &[".abc$"]);
        check_marks(Content::Text("abc".into()), &Bytes { bos: true, ..Bytes::default() }, 16, &["^ABC$"]);
    }

    #[test]
    fn cut_text_trains_every_token_once() {
        check_marks(Content::Text("abcdefg".into()), &Bytes::default(), 4, &[".abcd", ".defg", ".g$"]);
    }

    #[test]
    fn a_pair_trains_its_completion() {
        check_marks(pair("abc", "de"), &Bytes::default(), 16, &["abcDE$"]);
        check_marks(pair("abc", "de"), &Bytes { bos: true, ..Bytes::default() }, 16, &["^abcDE$"]);
        check_marks(pair("", "de"), &Bytes::default(), 16, &["dE$"]);
    }

    #[test]
    fn a_long_pair_keeps_the_end_of_its_prompt_and_the_start_of_its_completion() {
        check_marks(pair("abcdefgh", "ijk"), &Bytes::default(), 8, &["efghIJK$"]);
        check_marks(pair("abcdefgh", "ijklmnop"), &Bytes::default(), 6, &["fghIJK"]);
        check_marks(pair("ab", "cdefghij"), &Bytes::default(), 6, &["abCDEF"]);
        check_marks(pair("abcdef", "ghijkl"), &Bytes { bos: true, ..Bytes::default() }, 6, &["^efGHI"]);
        check_marks(pair("abc", "def"), &Bytes { bos: true, ..Bytes::default() }, 2, &["^D"]);
    }

    #[test]
    fn a_conversation_trains_what_the_assistant_says_and_its_end() {
        let turns = [("system", "s"), ("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "no")];
        check_marks(chat(&turns), &Bytes::default(), 99, &["<s:s$\n<u:hi$\n<a:YO#\n<u:so$\n<a:NO#\n"]);
    }

    #[test]
    fn a_template_that_rewrites_what_was_said_is_refused() {
        let turns = chat(&[("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "no")]);
        let error = encode_record(&record(turns), &Bytes { unstable: true, ..Bytes::default() }, 99).unwrap_err();
        assert!(error.to_string().contains("line 7: the chat template writes message 1 differently"), "{error}");
    }

    #[test]
    fn what_trains_nothing_makes_no_sequence() {
        check_marks(chat(&[("user", "hi")]), &Bytes::default(), 99, &[]);
        check_marks(chat(&[("user", "a long question"), ("assistant", "yo")]), &Bytes::default(), 8, &["a:YO#\n"]);
    }

    #[test]
    fn a_sequence_of_one_token_is_refused_with_advice() {
        let error = encode_record(&record(pair("a", "b")), &Bytes::default(), 1).unwrap_err().to_string();
        assert!(error.contains("sequence_tokens_max = 1") && error.contains("at least 2"), "{error}");
    }

    proptest! {
        #[test]
        fn sequences_fit_and_train_each_target_once(
            text in "[a-z]{1,60}", prompt in "[a-z]{0,60}", tokens_max in 2u32..40, bos: bool,
        ) {
            let encoder = Bytes { bos, ..Bytes::default() };
            let Encoded { sequences: cut, cut: count } =
                encode_record(&record(Content::Text(text.clone())), &encoder, tokens_max).unwrap();
            prop_assert_eq!(count, usize::from(cut.len() > 1));
            let trained = cut.iter().flat_map(|sequence| sequence.trained()).filter(|trained| **trained).count();
            prop_assert_eq!(trained, text.len() + usize::from(bos));

            let Encoded { sequences: pair, cut: count } =
                encode_record(&record(pair(&prompt, &text)), &encoder, tokens_max).unwrap();
            let tokens = usize::from(bos) + prompt.len() + text.len() + 1;
            prop_assert_eq!(count, usize::from(tokens > tokens_max as usize));
            prop_assert_eq!(pair.len(), 1);
            for sequence in cut.iter().chain(&pair) {
                prop_assert!(sequence.tokens().len() <= tokens_max as usize);
                prop_assert!(!sequence.trained()[0] && sequence.trained().contains(&true));
            }
        }
    }

    /// One token per byte, 256 further on; `<role:content$` and a line break per message.
    #[derive(Default)]
    struct Bytes {
        bos: bool,
        /// The template leaves out what the assistant said before its last message.
        unstable: bool,
    }

    impl TextEncoder for Bytes {
        fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
            Ok(text.bytes().map(|byte| if byte == b'$' { EOS } else { 256 + u32::from(byte) }).collect())
        }

        fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
            let mut text = String::new();
            for (index, Message { role, content }) in messages.iter().enumerate() {
                let hidden = self.unstable && role == "assistant" && index + 1 < messages.len();
                text += &format!("<{}:{}$\n", &role[..1], if hidden { "" } else { content });
            }
            Ok(text + if add_generation_prompt { "<a:" } else { "" })
        }

        fn bos(&self) -> Option<u32> {
            self.bos.then_some(BOS)
        }

        fn eos(&self) -> Option<u32> {
            Some(EOS)
        }
    }

    /// `expected` spells trained letters in capitals, BOS `^`, EOS `$` (`#` where its being trained is told apart); a
    /// leading `.` says that all but the first token are trained.
    fn check_marks(content: Content, encoder: &Bytes, tokens_max: u32, expected: &[&str]) {
        let conversation = matches!(content, Content::Conversation(_));
        let sequences = encode_record(&record(content), encoder, tokens_max).unwrap().sequences;
        let spelled = sequences.iter().zip(0..).map(|(sequence, index)| {
            let letters = sequence.tokens().iter().zip(sequence.trained()).map(|(token, trained)| match *token {
                BOS => '^',
                EOS if *trained && conversation => '#',
                EOS => '$',
                byte if *trained => char::from_u32(byte - 256).unwrap().to_ascii_uppercase(),
                byte => char::from_u32(byte - 256).unwrap(),
            });
            let spelled: String = letters.collect();
            match expected.get(index) {
                Some(hint) if hint.starts_with('.') => {
                    assert!(sequence.trained()[1..].iter().all(|trained| *trained), "{spelled}");
                    format!(".{}", spelled.to_lowercase())
                }
                _ => spelled,
            }
        });
        assert_eq!(spelled.collect::<Vec<_>>(), expected);
    }

    fn record(content: Content) -> Record {
        Record { content, fields: BTreeMap::new(), line: 7 }
    }

    fn pair(prompt: &str, completion: &str) -> Content {
        Content::Pair { prompt: prompt.into(), completion: completion.into() }
    }

    fn chat(turns: &[(&str, &str)]) -> Content {
        let message = |(role, content): &(&str, &str)| Message { role: (*role).into(), content: (*content).into() };
        Content::Conversation(turns.iter().map(message).collect())
    }
}
