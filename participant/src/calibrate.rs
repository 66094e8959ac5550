//! Which columns of a model's matrices matter for this device's data: an importance matrix.
//!
//! What leaves the device, if its owner hands the file on, are sums over all tokens of all records, one number for each
//! channel; the coordinator adds those of several devices up.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use model::{Adapter, ChannelSums, Walk};

use crate::ParticipantError;
use crate::encoder::{columns, encode_file, longest_sequence};
use crate::output::check_output;

#[derive(Args)]
pub struct CalibrateArguments {
    /// A Hugging Face directory or a GGUF file
    #[arg(long)]
    model: PathBuf,
    /// A PEFT adapter for it
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[arg(long)]
    data: PathBuf,
    /// The importance matrix, as llama-imatrix writes it
    #[arg(long)]
    out: PathBuf,
    /// Names the records' columns: the `[data.columns]` of this experiment [default: text, prompt, completion, messages]
    #[arg(long)]
    experiment: Option<PathBuf>,
    /// Longer records are cut [default: 512, or the model's context where that is less]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    sequence_tokens_max: Option<u32>,
    /// Records behind these tokens are left out; sums hardly change any more
    #[arg(long, default_value = "65536")]
    tokens_max: NonZeroUsize,
    #[arg(long)]
    pub json: bool,
}

impl CalibrateArguments {
    /// Writes the file, and returns its path and the tokens that it was measured on.
    pub fn run(&self) -> Result<(&Path, usize), ParticipantError> {
        // Not only when all is measured.
        check_output(
            "--out",
            &self.out,
            &[
                ("--model", Some(&self.model)),
                ("--adapter", self.adapter.as_ref()),
                ("--data", Some(&self.data)),
                ("--experiment", self.experiment.as_ref()),
            ],
        )?;
        let columns = columns(self.experiment.as_deref())?;
        let source = model::source::open(&self.model)?;
        let adapter = match &self.adapter {
            Some(directory) => Adapter::load(directory, source.config())?,
            None => Adapter::none(),
        };
        let longest = longest_sequence(self.sequence_tokens_max, source.config().context)?;
        let sequences = encode_file(&self.data, &columns, source.tokenizer(), longest)?;
        let mut tokens = 0;
        let sequences = sequences.iter().map(|sequence| sequence.tokens().to_vec()).take_while(|sequence| {
            let room = tokens < self.tokens_max.get();
            tokens += sequence.len();
            room
        });
        let sequences: Vec<Vec<u32>> = sequences.collect();
        let walk = Walk::with_adapter(&*source, adapter, &sequences)?;
        // The name of the device's file stays with the device.
        let imatrix = measure(walk)?.imatrix("a device's records".to_owned());
        let written = imatrix.and_then(|imatrix| imatrix.write(&self.out));
        written.map_err(|error| ParticipantError::Usage(format!("failed to {error}")))?;
        Ok((&self.out, sequences.iter().map(Vec::len).sum()))
    }
}

/// Takes a text through a model.
fn measure(mut walk: Walk<'_>) -> Result<ChannelSums, ParticipantError> {
    let blocks = 0..walk.config().blocks;
    let mut sums = ChannelSums::new(walk.config(), blocks.clone());
    for block in blocks {
        walk.step(|inputs| sums.add(block, &inputs))?;
    }
    Ok(sums)
}
