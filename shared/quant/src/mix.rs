//! Mixes: which type each tensor of a quantized file gets.
//!
//! A [`Mix`] is named like llama-quantize's and chooses as it does: most tensors get the base type, the ones that suffer
//! most get a wider one, and a row that is not whole blocks falls back to a type of smaller blocks. [`Mix::tensor_type`] is
//! a function of names and shapes; it sees neither weights nor files. Left out is what llama-quantize does for mixtures of
//! experts, for other architectures, and for models of exactly 80 layers.

use crate::BlockType;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // The names are ggml's, and appear in file names and TOML.
pub enum Mix {
    F32,
    F16,
    BF16,
    Q8_0,
    Q6_K,
    Q5_K_M,
    Q5_K_S,
    Q5_1,
    Q5_0,
    Q4_K_M,
    Q4_K_S,
    Q4_1,
    Q4_0,
    IQ4_NL,
    Q3_K_L,
    Q3_K_M,
    Q3_K_S,
    Q2_K,
    Q2_K_S,
    TQ2_0,
    TQ1_0,
}

/// What a mix has to know of the model besides the tensor at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// The embedding is the LM head too, and there is no `output.weight`.
    pub tied: bool,
    /// The quantizer is given the importance of columns, which serves some tensors better than a wider type.
    pub importance: bool,
}

impl Mix {
    /// From the most to the fewest bits.
    pub const ALL: [Mix; 21] = {
        use Mix::*;
        [
            F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, Q3_K_L, Q3_K_M,
            Q3_K_S, Q2_K, Q2_K_S, TQ2_0, TQ1_0,
        ]
    };

    pub fn from_name(name: &str) -> Option<Mix> {
        Self::ALL.into_iter().find(|mix| mix.name() == name)
    }

    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// ggml's number for such a file, the value of `general.file_type`.
    pub fn file_type(self) -> u32 {
        self.row().1
    }

    /// The type of most tensors.
    pub fn base(self) -> BlockType {
        self.row().2
    }

    const fn row(self) -> (&'static str, u32, BlockType) {
        match self {
            Mix::F32 => ("F32", 0, BlockType::F32),
            Mix::F16 => ("F16", 1, BlockType::F16),
            Mix::BF16 => ("BF16", 32, BlockType::BF16),
            Mix::Q8_0 => ("Q8_0", 7, BlockType::Q8_0),
            Mix::Q6_K => ("Q6_K", 18, BlockType::Q6_K),
            Mix::Q5_K_M => ("Q5_K_M", 17, BlockType::Q5_K),
            Mix::Q5_K_S => ("Q5_K_S", 16, BlockType::Q5_K),
            Mix::Q5_1 => ("Q5_1", 9, BlockType::Q5_1),
            Mix::Q5_0 => ("Q5_0", 8, BlockType::Q5_0),
            Mix::Q4_K_M => ("Q4_K_M", 15, BlockType::Q4_K),
            Mix::Q4_K_S => ("Q4_K_S", 14, BlockType::Q4_K),
            Mix::Q4_1 => ("Q4_1", 3, BlockType::Q4_1),
            Mix::Q4_0 => ("Q4_0", 2, BlockType::Q4_0),
            Mix::IQ4_NL => ("IQ4_NL", 25, BlockType::IQ4_NL),
            Mix::Q3_K_L => ("Q3_K_L", 13, BlockType::Q3_K),
            Mix::Q3_K_M => ("Q3_K_M", 12, BlockType::Q3_K),
            Mix::Q3_K_S => ("Q3_K_S", 11, BlockType::Q3_K),
            Mix::Q2_K => ("Q2_K", 10, BlockType::Q2_K),
            Mix::Q2_K_S => ("Q2_K_S", 21, BlockType::Q2_K),
            Mix::TQ2_0 => ("TQ2_0", 37, BlockType::TQ2_0),
            Mix::TQ1_0 => ("TQ1_0", 36, BlockType::TQ1_0),
        }
    }

    /// The type of the tensor called `name` in GGUF, whose row-major shape is `shape`. Vectors and norms stay F32.
    pub fn tensor_type(self, layout: &Layout, name: &str, shape: &[usize]) -> BlockType {
        let &[_, .., columns] = shape else { return BlockType::F32 };
        if name.ends_with("_norm.weight") {
            return BlockType::F32;
        }
        let plain = matches!(self, Mix::F32 | Mix::F16 | Mix::BF16);
        if plain { self.base() } else { fallback(self.wanted(layout, name, columns), columns) }
    }

    /// The type before anybody asks whether it divides the row; only the embedding and the head ask earlier.
    fn wanted(self, layout: &Layout, name: &str, columns: usize) -> BlockType {
        let base = self.base();
        let head = if layout.tied { "token_embd.weight" } else { "output.weight" };
        if name == head {
            let exact = base == BlockType::Q8_0 || !columns.is_multiple_of(base.block_elements());
            return if exact { BlockType::Q8_0 } else { BlockType::Q6_K };
        }
        if name == "token_embd.weight" {
            let ternary = matches!(base, BlockType::TQ1_0 | BlockType::TQ2_0);
            return if ternary { BlockType::Q4_K } else { base };
        }
        match block_tensor(name) {
            Some((layer, "attn_v.weight")) => self.attention_value(layout, layer),
            Some((_, "attn_output.weight")) => self.attention_output(),
            Some((layer, "ffn_down.weight")) => self.ffn_down(layout, layer),
            _ => base,
        }
    }

    fn attention_value(self, layout: &Layout, layer: usize) -> BlockType {
        // A value matrix shared by many heads is small and matters to all of them.
        let shared = layout.heads >= 4 * layout.kv_heads;
        match self {
            Mix::Q2_K if shared => BlockType::Q4_K,
            Mix::Q2_K => BlockType::Q3_K,
            Mix::Q2_K_S if shared => BlockType::Q4_K,
            Mix::Q3_K_M if layer < 2 => BlockType::Q5_K,
            Mix::Q3_K_M => BlockType::Q4_K,
            Mix::Q3_K_L => BlockType::Q5_K,
            Mix::Q4_K_S if layer < 4 => BlockType::Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if layout.deserves_more(layer) => BlockType::Q6_K,
            Mix::IQ4_NL if shared => BlockType::Q5_K,
            _ => self.base(),
        }
    }

    fn attention_output(self) -> BlockType {
        match self {
            Mix::Q2_K => BlockType::Q3_K,
            Mix::Q3_K_M => BlockType::Q4_K,
            Mix::Q3_K_L => BlockType::Q5_K,
            _ => self.base(),
        }
    }

    fn ffn_down(self, layout: &Layout, layer: usize) -> BlockType {
        let first_eighth = layer < layout.layers / 8;
        match self {
            Mix::Q2_K => BlockType::Q3_K,
            Mix::Q2_K_S if first_eighth => BlockType::Q4_K,
            Mix::Q3_K_M if layer < layout.layers / 16 => BlockType::Q5_K,
            Mix::Q3_K_M => BlockType::Q4_K,
            Mix::Q3_K_L => BlockType::Q5_K,
            Mix::Q4_K_S if first_eighth => BlockType::Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if layout.deserves_more(layer) => BlockType::Q6_K,
            Mix::IQ4_NL if first_eighth && !layout.importance => BlockType::Q5_K,
            Mix::Q4_0 if first_eighth && layout.importance => BlockType::Q4_1,
            Mix::Q5_0 if first_eighth && layout.importance => BlockType::Q5_1,
            _ => self.base(),
        }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Layout {
    /// The first and the last eighth of the layers, and every third between them.
    fn deserves_more(&self, layer: usize) -> bool {
        let eighth = self.layers / 8;
        layer < eighth || layer >= 7 * self.layers / 8 || (layer - eighth) % 3 == 2
    }
}

/// The layer and the rest of a name such as `blk.3.attn_v.weight`.
fn block_tensor(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// The nearest type whose blocks divide a row of `columns`, never a narrower one; F16 if there is none.
fn fallback(wanted: BlockType, columns: usize) -> BlockType {
    if columns.is_multiple_of(wanted.block_elements()) {
        return wanted;
    }
    let smaller = match wanted {
        BlockType::Q2_K | BlockType::Q3_K | BlockType::TQ1_0 | BlockType::TQ2_0 => BlockType::Q4_0,
        BlockType::Q4_K => BlockType::Q5_0,
        BlockType::Q5_K => BlockType::Q5_1,
        BlockType::Q6_K => BlockType::Q8_0,
        _ => BlockType::F16,
    };
    if columns.is_multiple_of(smaller.block_elements()) { smaller } else { BlockType::F16 }
}

#[cfg(test)]
mod tests;
