use proptest::prelude::*;

use super::bytes::{byte_letter, letter_byte};
use super::*;

const IM_START: u32 = 257;
const IM_END: u32 = 258;

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

/// A byte-level vocabulary: the 256 letters, then `words`, then `<|endoftext|>`.
fn byte_level(pre: &str, words: &[&str], merges: &[&str]) -> GgufTokenizer {
    let letters = (0..=255).map(|byte| byte_letter(byte).to_string());
    let words = words.iter().map(|word| word.to_string());
    let tokens: Vec<String> = letters.chain(words).chain(["<|endoftext|>".to_owned()]).collect();
    let mut token_types = vec![1; tokens.len()];
    *token_types.last_mut().unwrap() = 3;
    GgufTokenizer {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        token_types,
        merges: merges.iter().map(|merge| merge.to_string()).collect(),
        ..GgufTokenizer::default()
    }
}

/// A SentencePiece vocabulary: `<unk>`, `<s>`, the 256 byte tokens, then pieces with their scores.
fn sentence_piece(pieces: &[(&str, f32)]) -> GgufTokenizer {
    let bytes = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0));
    let pieces = pieces.iter().map(|(piece, score)| (piece.to_string(), 1, *score));
    let special = [("<unk>".to_owned(), 2, 0.0), ("<s>".to_owned(), 3, 0.0)];
    let mut gguf = GgufTokenizer {
        model: "llama".to_owned(),
        scores: Some(Vec::new()),
        bos: Some(1),
        unknown: Some(0),
        ..GgufTokenizer::default()
    };
    for (text, kind, score) in special.into_iter().chain(bytes).chain(pieces) {
        gguf.tokens.push(text);
        gguf.token_types.push(kind);
        gguf.scores.as_mut().unwrap().push(score);
    }
    gguf
}

fn from_gguf(metadata: GgufTokenizer) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_gguf(metadata, Path::new("models/m.gguf"))
}

fn from_huggingface_files(files: &HuggingFaceFiles) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_huggingface_files(files, Path::new("models/m"))
}

fn check_words(tokenizer: &Tokenizer, text: &str, expected: &[&str]) {
    let ids = tokenizer.encode(text, false).unwrap();
    let words: Vec<&str> = ids.iter().map(|&id| tokenizer.token_text(id).unwrap()).collect();
    assert_eq!(words, expected, "tokens of {text:?}");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
}

#[track_caller]
fn check_refused(result: Result<Tokenizer, TokenizerError>, message: &str) {
    let error = result.expect_err("should be refused").to_string();
    assert!(error.contains(message), "{error:?} should contain {message:?}");
}

/// Whatever format a tokenizer goes through, it must give the same ids afterwards.
fn check_formats_agree(tokenizer: &Tokenizer, text: &str) {
    let read = tokenizers::Tokenizer::from_bytes(tokenizer.json()).unwrap();
    assert_eq!(tokenizer.engine.to_string(false).unwrap(), read.to_string(false).unwrap());
    let json = Tokenizer::from_json(&tokenizer.json(), tokenizer.settings()).unwrap();
    assert_eq!(json.json(), tokenizer.json(), "the document is canonical");
    let gguf = from_gguf(tokenizer.gguf().unwrap()).unwrap();
    assert_eq!(gguf.gguf().unwrap(), tokenizer.gguf().unwrap());
    for parse_special in [false, true] {
        let ids = tokenizer.encode(text, parse_special).unwrap();
        assert_eq!(json.encode(text, parse_special).unwrap(), ids);
        assert_eq!(gguf.encode(text, parse_special).unwrap(), ids);
    }
}

#[test]
fn every_byte_has_a_letter_of_its_own() {
    for byte in 0..=255 {
        assert_eq!(letter_byte(byte_letter(byte)), Some(byte));
    }
    assert_eq!((byte_letter(b' '), byte_letter(b'\n'), byte_letter(b'a')), ('Ġ', 'Ċ', 'a'));
    assert_eq!(letter_byte(' '), None);
    assert_eq!(letter_byte('\u{144}'), None);
}

#[test]
fn byte_tokenizer_gives_the_bytes_of_the_text() {
    let tokenizer = Tokenizer::bytes();
    assert_eq!(tokenizer.vocabulary_size(), 259);
    assert_eq!(tokenizer.encode("Hi é!\n", false).unwrap(), [72, 105, 32, 195, 169, 33, 10]);
    assert_eq!(tokenizer.token_text(32), Some("Ġ"));
    assert_eq!(tokenizer.settings().eos, [IM_END, 256]);
    assert_eq!(tokenizer.text_prefix(), None);
}

#[test]
fn special_tokens_in_a_text_are_plain_unless_asked_for() {
    let tokenizer = Tokenizer::bytes();
    assert_eq!(tokenizer.encode("a<|im_end|>b", true).unwrap(), [97, IM_END, 98]);
    let plain = tokenizer.encode("a<|im_end|>b", false).unwrap();
    assert!(plain.iter().all(|&id| id < 256));
    assert_eq!(plain.len(), 12);
    assert_eq!(tokenizer.decode(&[97, IM_END, 98]).unwrap(), "a<|im_end|>b");
}

#[test]
fn byte_tokenizer_speaks_chatml() {
    let tokenizer = Tokenizer::bytes();
    let messages = [message("system", "Be brief."), message("user", "Hi {{ 1 }}")];
    let text = tokenizer.chat(&messages, true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ 1 }}<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = tokenizer.encode(&text, true).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == IM_START).count(), 3);
    assert_eq!(ids.iter().filter(|&&id| id == IM_END).count(), 2);
    assert!(!tokenizer.chat(&messages, false).unwrap().ends_with("assistant\n"));
}

#[test]
fn smollm_leaves_every_digit_alone_and_gpt2_does_not() {
    let words = ["12", "Ġ1", "ab"];
    let merges = ["1 2", "Ġ 1", "a b"];
    let gpt2 = from_gguf(byte_level("gpt-2", &words, &merges)).unwrap();
    check_words(&gpt2, "ab 12", &["ab", "Ġ", "12"]);
    check_words(&gpt2, "ab 13", &["ab", "Ġ1", "3"]);
    let smollm = from_gguf(byte_level("smollm", &words, &merges)).unwrap();
    check_words(&smollm, "ab 12", &["ab", "Ġ", "1", "2"]);
    check_formats_agree(&smollm, "ab  12<|endoftext|>");
    check_formats_agree(&gpt2, "ab  12<|endoftext|>");
}

#[test]
fn llama_keeps_words_that_are_tokens_and_qwen_merges() {
    // No merge gives "abc" from "ab" and "c".
    let words = ["ab", "bc", "abc", "123"];
    let merges = ["a b", "b c", "a bc"];
    let llama = from_gguf(byte_level("llama-bpe", &words, &merges)).unwrap();
    check_words(&llama, "abc1234", &["abc", "123", "4"]);
    let qwen = from_gguf(byte_level("qwen2", &words, &merges)).unwrap();
    check_words(&qwen, "abc1234", &["ab", "c", "1", "2", "3", "4"]);
    // Qwen composes e and a combining acute accent into é.
    assert_eq!(qwen.encode("e\u{301}", false).unwrap(), qwen.encode("é", false).unwrap());
    check_formats_agree(&llama, "abc 1234 e\u{301}");
    check_formats_agree(&qwen, "abc 1234 e\u{301}");
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let pieces = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("bc", -1.0), ("ab", -2.0), ("▁a", -3.0)];
    let tokenizer = from_gguf(sentence_piece(&pieces)).unwrap();
    check_words(&tokenizer, "abc", &["▁a", "bc"]);
    check_words(&tokenizer, " ab", &["▁", "▁", "ab"]);
    check_words(&tokenizer, "é", &["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.text_prefix(), Some(1));
    assert_eq!(tokenizer.encode("<s>", true).unwrap(), [1]);
    assert!(!tokenizer.encode("<s><0x0A>", false).unwrap().contains(&1));
    check_formats_agree(&tokenizer, " abc <s>a é");
}

#[test]
fn without_a_leading_space_the_text_starts_as_it_is() {
    let pieces = [("▁", -9.0), ("a", -9.0), ("▁a", -3.0)];
    let gguf = GgufTokenizer { add_space_prefix: Some(false), ..sentence_piece(&pieces) };
    let tokenizer = from_gguf(gguf).unwrap();
    check_words(&tokenizer, "a a", &["a", "▁a"]);
    check_words(&tokenizer, " a", &["▁a"]);
    check_formats_agree(&tokenizer, "a a");
}

#[test]
fn stream_never_emits_half_a_character() {
    let tokenizer = Tokenizer::bytes();
    let mut stream = tokenizer.decode_stream();
    let emitted: Vec<String> = "é😀".bytes().map(|byte| stream.push(u32::from(byte)).unwrap()).collect();
    assert_eq!(emitted, ["", "é", "", "", "", "😀"]);
    assert_eq!(stream.finish(), "");

    let mut stream = tokenizer.decode_stream();
    assert_eq!(stream.push(0xC3).unwrap(), "");
    assert_eq!(stream.push(u32::from(b'x')).unwrap(), "\u{FFFD}x");
    assert_eq!(stream.push(0xF0).unwrap(), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
}

#[test]
fn unknown_ids_are_errors() {
    let tokenizer = Tokenizer::bytes();
    assert!(matches!(tokenizer.decode(&[259]), Err(TokenizerError::UnknownId { id: 259, vocabulary: 259 })));
    assert_eq!(tokenizer.token_text(u32::MAX), None);
}

#[test]
fn very_long_texts_are_refused() {
    let text = "a".repeat(TEXT_BYTES_MAX + 1);
    assert!(matches!(Tokenizer::bytes().encode(&text, false), Err(TokenizerError::TextTooLong { .. })));
}

#[test]
fn padding_fills_up_to_the_embedding_rows() {
    let mut gguf = Tokenizer::bytes().gguf().unwrap();
    gguf.pad_to(264);
    assert_eq!(gguf.tokens[263], "[PAD263]");
    let tokenizer = from_gguf(gguf).unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 264);
    assert!(tokenizer.encode("[PAD263]", true).unwrap().iter().all(|&id| id < 256));
}

#[test]
fn huggingface_settings_are_gathered_from_all_files() {
    let document = Tokenizer::bytes().json();
    let config = br#"{"bos_token": {"content": "<|im_start|>", "lstrip": false}, "eos_token": "<|im_end|>",
        "add_bos_token": true, "chat_template": [{"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content.strip() }}"}]}"#;
    let mut files = HuggingFaceFiles {
        tokenizer: &document,
        tokenizer_config: Some(config),
        generation_config: Some(br#"{"eos_token_id": [256, 258], "top_p": 0.8}"#),
        config: Some(br#"{"eos_token_id": 256, "bos_token_id": 0}"#),
        ..HuggingFaceFiles::default()
    };
    let tokenizer = from_huggingface_files(&files).unwrap();
    assert_eq!(tokenizer.settings().eos, [IM_END, 256]);
    assert_eq!(tokenizer.text_prefix(), Some(IM_START));
    assert_eq!(tokenizer.chat(&[message("user", "  x ")], true).unwrap(), "<|im_start|>x");

    // The written document says by itself that texts begin with bos.
    let document = tokenizer.json();
    files.tokenizer = &document;
    files.tokenizer_config = Some(br#"{"bos_token": "<|im_start|>"}"#);
    files.chat_template = Some(b"{% if tools is none %}{{ eos_token }}{% endif %}");
    let tokenizer = from_huggingface_files(&files).unwrap();
    assert_eq!(tokenizer.text_prefix(), Some(IM_START));
    assert_eq!(tokenizer.chat(&[], false).unwrap(), "<|endoftext|>");
}

#[test]
fn contradictory_gguf_metadata_is_refused() {
    let read = from_gguf;
    let good = || byte_level("gpt-2", &["ab"], &["a b"]);
    read(good()).unwrap();
    let with = |merges: &[&str]| byte_level("gpt-2", &["ab"], merges);
    check_refused(read(with(&["a zz"])), "ends with something that is no token");
    check_refused(read(with(&["b a"])), "gives something that is no token");
    check_refused(read(with(&["a b", "a b"])), "merge 1 (\"a\", \"b\") occurs twice");
    check_refused(read(with(&["ab"])), "is not two tokens with one space between them");
    check_refused(read(byte_level("gpt-2", &["ab", "ab"], &[])), "tokens 256 and 257 are both \"ab\"");
    check_refused(read(byte_level("gpt-2", &[""], &[])), "token 256 is malformed: it has no text");
    check_refused(read(byte_level("gpt-2", &["x".repeat(9000).as_str()], &[])), "longer than 2048");
    check_refused(read(byte_level("tekken", &[], &[])), "tokenizer.ggml.pre tekken is not supported");
    check_refused(read(GgufTokenizer { model: "bert".to_owned(), ..good() }), "tokenizer.ggml.model bert");
    check_refused(read(GgufTokenizer { bos: Some(258), ..good() }), "bos names id 258, but the vocabulary has 258");
    check_refused(read(GgufTokenizer { eos: Some(u32::MAX), ..good() }), "eos names id 4294967295");
    check_refused(read(GgufTokenizer { token_types: vec![1; 257], ..good() }), "token_type has 257 entries for 258");
    check_refused(read(GgufTokenizer { token_types: vec![-1; 258], ..good() }), "its type -1");
    check_refused(read(GgufTokenizer { tokens: vec![], token_types: vec![], ..good() }), "it has no tokens");
}

#[test]
fn contradictory_sentence_piece_metadata_is_refused() {
    let read = from_gguf;
    let good = || sentence_piece(&[("a", -1.0)]);
    read(good()).unwrap();
    check_refused(read(GgufTokenizer { scores: None, ..good() }), "scores has 0 entries for 259 tokens");
    check_refused(read(sentence_piece(&[("a", f32::NAN)])), "its score is NaN");
    check_refused(read(sentence_piece(&[("a".repeat(300).as_str(), 0.0)])), "more than the limit of 256");
    check_refused(read(GgufTokenizer { unknown: Some(259), ..good() }), "unknown token names id 259");
    let mut gguf = good();
    gguf.token_types[258] = 6;
    check_refused(read(gguf), "not of the form <0xXX>");
    let mut gguf = good();
    (gguf.unknown, gguf.token_types[100]) = (None, 1);
    check_refused(read(gguf), "255 byte tokens and no unknown token");
}

#[test]
fn tokenizer_json_of_another_kind_is_refused() {
    let tokenizer = Tokenizer::bytes();
    let document = String::from_utf8(tokenizer.json()).unwrap();
    let check = |from: &str, to: &str, message: &str| {
        assert!(document.contains(from), "{from} should occur");
        check_refused(Tokenizer::from_json(document.replace(from, to).as_bytes(), tokenizer.settings()), message);
    };
    check("\"BPE\"", "\"WordPiece\"", "algorithm WordPiece is not supported");
    check("\"dropout\":null", "\"dropout\":0.1", "merge dropout");
    check("\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"é\"", "subword affix");
    check(
        "\"pre_tokenizer\":{\"add_prefix_space\":false",
        "\"pre_tokenizer\":{\"add_prefix_space\":true",
        "pre_tokenizer",
    );
    check("\"normalizer\":null", "\"normalizer\":{\"type\":\"Lowercase\"}", "unknown variant `Lowercase`");
    check("\"lstrip\":false", "\"lstrip\":true", "strips spaces");
    check("{\"id\":256", "{\"id\":255", "the vocabulary says");
    check("{\"id\":256", "{\"id\":4294967295", "range of ids");
    check("\"A\":65", "\"A\":66", "another token, \"A\", has this id");
    check("\"A\":65", "\"A\":-1", "invalid value");
    check("\"unk_token\":null", "\"unk_token\":\"<unk>\"", "unk_token names \"<unk>\"");
    check("\"merges\":[]", "\"merges\":[[\"a\",\"b\"]]", "gives something that is no token");
    check("\"A\":65,", "\"B\":65,", "tokens 65 and 66 are both \"B\"");
    let split = r#""pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"(a*)*b"},
        "behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},"x":{"#;
    check("\"pre_tokenizer\":{", split, "(a*)*b");
}

#[test]
fn templates_cannot_run_for_ever() {
    let with = |template: &str| {
        let settings = TokenizerSettings { chat_template: Some(template.to_owned()), ..TokenizerSettings::default() };
        Tokenizer::from_json(&Tokenizer::bytes().json(), &settings)
    };
    let check = |template: &str, message: &str| {
        let error = with(template).unwrap().chat(&[], true).expect_err("should fail").to_string();
        assert!(error.contains(message), "{error:?} should contain {message:?}");
    };
    check("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "out of fuel");
    check("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit");
    check("{{ raise_exception('roles must alternate') }}", "roles must alternate");
    check("{% include 'other' %}", "non-existing template");
    check_refused(with("{% if %}"), "chat template in the model's manifest: syntax error");
    check_refused(with(&"x".repeat(70_000)), "more than the limit of 65536");
    let silent = Tokenizer::from_json(&Tokenizer::bytes().json(), &TokenizerSettings::default()).unwrap();
    assert!(matches!(silent.chat(&[], true), Err(TokenizerError::NoChatTemplate)));
}

#[test]
fn a_template_s_error_names_the_file_that_it_is_in() {
    let document = Tokenizer::bytes().json();
    let mut files = HuggingFaceFiles {
        tokenizer: &document,
        tokenizer_config: Some(br#"{"chat_template": "{% if %}"}"#),
        ..HuggingFaceFiles::default()
    };
    check_refused(from_huggingface_files(&files), "chat template in models/m/tokenizer_config.json: syntax error");
    files.chat_template = Some(b"{% if %}");
    check_refused(from_huggingface_files(&files), "chat template in models/m/chat_template.jinja: syntax error");
    let template = Some("{{ raise_exception('no turns') }}".to_owned());
    let gguf = GgufTokenizer { chat_template: template, ..byte_level("gpt-2", &[], &[]) };
    let tokenizer = from_gguf(gguf).unwrap();
    let error = tokenizer.chat(&[], true).unwrap_err().to_string();
    assert!(error.starts_with("chat template in models/m.gguf: ") && error.contains("no turns"), "{error}");
}

#[test]
fn settings_that_name_no_token_are_refused() {
    let document = Tokenizer::bytes().json();
    let read = |settings| Tokenizer::from_json(&document, &settings);
    check_refused(read(TokenizerSettings { eos: vec![0, 259], ..Default::default() }), "eos names id 259");
    check_refused(read(TokenizerSettings { add_bos: true, ..Default::default() }), "there is no bos");
}

proptest! {
    #[test]
    fn byte_level_text_survives_a_round_trip(text in any::<String>(), parse_special: bool) {
        let tokenizer = Tokenizer::bytes();
        let ids = tokenizer.encode(&text, parse_special).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }

    #[test]
    fn stream_and_decode_agree(ids in prop::collection::vec(0u32..259, 0..40)) {
        let tokenizer = Tokenizer::bytes();
        let mut stream = tokenizer.decode_stream();
        let mut bytes = Vec::new();
        let mut text = String::new();
        for &id in &ids {
            bytes.extend(tokenizer.token_bytes(id).unwrap());
            text.push_str(&stream.push(id).unwrap());
        }
        text.push_str(&stream.finish());
        prop_assert_eq!(&text, &tokenizer.decode(&ids).unwrap());
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Tokenizer::from_json(&bytes, &TokenizerSettings::default());
    }

    #[test]
    fn damaged_documents_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), spm: bool) {
        let gguf = if spm {
            sentence_piece(&[("a", -2.0), ("▁", -2.0), ("▁a", -1.0)])
        } else {
            byte_level("qwen2", &["ab"], &["a b"])
        };
        let mut document = from_gguf(gguf).unwrap().json();
        let at = at.index(document.len());
        document[at] = byte;
        if let Ok(tokenizer) = Tokenizer::from_json(&document, &TokenizerSettings::default()) {
            let ids = tokenizer.encode("ab a <s> <|endoftext|> é\0\n", true).unwrap();
            tokenizer.decode(&ids).unwrap();
        }
    }
}
