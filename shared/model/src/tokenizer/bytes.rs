//! The letters that byte-level tokenizers write bytes with, and the vocabulary that has nothing but them.

use super::TokenizerSettings;
use super::vocabulary::{Kind, Scheme, Split, Token, Vocabulary};

/// The letter for a byte (GPT-2's table): printable Latin-1 characters stand for themselves, the other 68 bytes get
/// U+0100 to U+0143 in order, so that no token contains a space or a control character.
pub(super) fn byte_letter(byte: u8) -> char {
    LETTERS[byte as usize]
}

/// The byte that a letter stands for.
pub(super) fn letter_byte(letter: char) -> Option<u8> {
    match letter as u32 {
        code if code < 256 => (LETTERS[code as usize] == letter).then_some(code as u8),
        code => LETTERS.iter().position(|&other| other as u32 == code).map(|byte| byte as u8),
    }
}

const LETTERS: [char; 256] = {
    let mut letters = ['\0'; 256];
    let mut byte = 0;
    let mut next = 256;
    while byte < 256 {
        letters[byte] = match byte {
            0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => byte as u8 as char,
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("U+0100 to U+0143 are characters")
            }
        };
        byte += 1;
    }
    letters
};

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
    + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Ids 0 to 255 are the bytes; `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` follow.
pub(super) fn byte_vocabulary() -> (Vocabulary, TokenizerSettings) {
    let token = |text: String, kind| Token { text, kind, normalized: false };
    let letters = (0..=255).map(|byte| token(byte_letter(byte).to_string(), Kind::Normal));
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(|text| token(text.to_owned(), Kind::Control));
    let vocabulary = Vocabulary::new(
        letters.chain(special).collect(),
        Vec::new(),
        Scheme::ByteLevel { split: Split::Gpt2, nfc: false },
        None,
    )
    .expect("letters and specials are distinct, and there are no merges");
    let settings =
        TokenizerSettings { bos: None, eos: vec![258, 256], add_bos: false, chat_template: Some(CHATML.to_owned()) };
    (vocabulary, settings)
}
