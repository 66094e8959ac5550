//! The merged model as a directory that transformers opens.

use std::fs;
use std::path::Path;

use experiment::write_atomically;
use model::Source;
use quant::{BlockType, quantize};
use serde_json::{Value, json};

use super::ExportError;
use super::merged::Merged;
use super::safetensors::SafetensorsWriter;

/// In the order in which they are written: a directory with a config.json is complete.
pub(super) const FILES: [&str; 5] =
    ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"];

pub(super) fn write(merged: &Merged<'_>, directory: &Path) -> Result<(), ExportError> {
    fs::create_dir_all(directory).map_err(ExportError::io(directory))?;
    let [weights, tokenizer, tokenizer_config, generation_config, config] = FILES.map(|file| directory.join(file));
    write_weights(merged, &weights)?;
    write_atomically(&tokenizer, &merged.tokenizer().json())?;
    let write_json = |path: &Path, value: Value| write_atomically(path, format!("{value:#}\n").as_bytes());
    write_json(&tokenizer_config, tokenizer_settings(merged))?;
    write_json(&generation_config, special_ids(merged))?;
    write_json(&config, model_config(merged))?;
    Ok(())
}

fn write_weights(merged: &Merged<'_>, path: &Path) -> Result<(), ExportError> {
    let tensors = merged.tensors().iter().map(|info| (info.name.clone(), info.shape.clone())).collect::<Vec<_>>();
    let mut writer = SafetensorsWriter::create(path, &tensors)?;
    for (name, shape) in &tensors {
        // Quantizing to f32 copies, and refuses what is not finite.
        let bytes = quantize(BlockType::F32, &merged.tensor(name, shape)?).map_err(ExportError::tensor(name))?;
        writer.write(&bytes)?;
    }
    writer.finish()
}

fn model_config(merged: &Merged<'_>) -> Value {
    let mut config = merged.config().to_huggingface();
    config["torch_dtype"] = json!("float32");
    // Said here as well, because transformers has defaults for them that belong to other models.
    let ids = special_ids(merged);
    for key in ["bos_token_id", "eos_token_id"] {
        config[key] = ids[key].clone();
    }
    config
}

fn special_ids(merged: &Merged<'_>) -> Value {
    let settings = merged.tokenizer().settings();
    let eos = match settings.eos[..] {
        [] => Value::Null,
        [id] => json!(id),
        ref ids => json!(ids),
    };
    json!({"bos_token_id": settings.bos, "eos_token_id": eos})
}

fn tokenizer_settings(merged: &Merged<'_>) -> Value {
    let tokenizer = merged.tokenizer();
    let settings = tokenizer.settings();
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
    json!({
        // tokenizer.json says everything; a class of some model's own would bring rules of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(settings.bos),
        "eos_token": text(settings.eos.first().copied()),
        "add_bos_token": settings.add_bos,
        "chat_template": settings.chat_template,
        "model_max_length": merged.config().context,
        "clean_up_tokenization_spaces": false,
    })
}
