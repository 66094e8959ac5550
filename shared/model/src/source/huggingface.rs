//! A Hugging Face directory: `config.json`, one or several safetensors files, and a tokenizer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use quant::BlockType;
use safetensors::{Dtype, tensor::Metadata};
use serde_json::Value;

use super::{Source, Take, TensorInfo, tensors_among};
use crate::tokenizer::HuggingFaceFiles;
use crate::{ModelConfig, ModelError, Tokenizer};

pub(super) struct HuggingFaceModel {
    directory: PathBuf,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Vec<TensorInfo>,
    /// Where each tensor's bytes lie.
    places: BTreeMap<String, Place>,
}

struct Place {
    path: PathBuf,
    start: u64,
    bytes: usize,
}

/// The header of a safetensors file is refused beyond this size.
const HEADER_BYTES_MAX: u64 = 8 << 20;

impl HuggingFaceModel {
    pub(super) fn open(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join("config.json");
        let raw: Value = read_json(&path)?;
        let config = ModelConfig::from_huggingface(&raw).map_err(|what| ModelError::file(&path, what))?;
        let tokenizer = read_tokenizer(directory)?;

        let mut infos = BTreeMap::new();
        let mut places = BTreeMap::new();
        for file in weight_files(directory)? {
            read_header(&file, &mut infos, &mut places)?;
        }
        let refused = |what: String| ModelError::file(directory, what);
        let tensors = tensors_among(&config, infos.len()).map_err(refused)?;
        let tensors = tensors.into_iter().map(|(name, shape)| {
            let info = infos.remove(&name).ok_or_else(|| refused(format!("has no tensor {name}")))?;
            if info.shape != shape {
                let found = &info.shape;
                return Err(refused(format!(
                    "{name} has shape {found:?}, and by config.json {shape:?}; copy or download config and weights again"
                )));
            }
            Ok(info)
        });
        let tensors = tensors.collect::<Result<_, _>>()?;
        if let Some(name) = infos.keys().find(|name| is_part_of_a_decoder(name)) {
            return Err(refused(format!(
                "has {name}, which belongs to no decoder that is supported, and answers without it would be wrong; \
                 use a model that does not have it"
            )));
        }
        Ok(Self { directory: directory.to_owned(), config, tokenizer, tensors, places })
    }

    fn place(&self, info: &TensorInfo) -> Result<&Place, ModelError> {
        let place = self.places.get(&info.name);
        place.ok_or_else(|| ModelError::file(&self.directory, format!("has no tensor {}", info.name)))
    }
}

impl Source for HuggingFaceModel {
    fn origin(&self) -> &Path {
        &self.directory
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, ModelError> {
        let mut bytes = Vec::with_capacity(self.place(info)?.bytes);
        self.read_pieces(info, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn read_pieces(&self, info: &TensorInfo, take: &mut Take<'_>) -> Result<(), ModelError> {
        let place = self.place(info)?;
        let mut file = File::open(&place.path).map_err(ModelError::io(&place.path))?;
        file.seek(SeekFrom::Start(place.start)).map_err(ModelError::io(&place.path))?;
        let mut piece = vec![0; info.piece_bytes().min(place.bytes)];
        let mut left = place.bytes;
        while left > 0 {
            piece.truncate(left);
            file.read_exact(&mut piece).map_err(ModelError::io(&place.path))?;
            left -= piece.len();
            take(&piece)?;
        }
        Ok(())
    }
}

/// Of names that are left over: biases, such as that of the output projection which `attention_bias` means as well, and
/// whatever stands in a block, but for frequencies that old checkpoints keep there.
fn is_part_of_a_decoder(name: &str) -> bool {
    (name.starts_with("model.layers.") || name.ends_with(".bias")) && !name.contains(".rotary_emb.")
}

fn read_tokenizer(directory: &Path) -> Result<Tokenizer, ModelError> {
    let path = directory.join("tokenizer.json");
    let tokenizer = std::fs::read(&path).map_err(ModelError::io(&path))?;
    let optional = |name: &str| std::fs::read(directory.join(name)).ok();
    let [settings, template, generation, config] =
        ["tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"].map(optional);
    let files = HuggingFaceFiles {
        tokenizer: &tokenizer,
        tokenizer_config: settings.as_deref(),
        chat_template: template.as_deref(),
        generation_config: generation.as_deref(),
        config: config.as_deref(),
    };
    Tokenizer::from_huggingface_files(&files, directory).map_err(|error| ModelError::file(directory, error))
}

fn read_json(path: &Path) -> Result<Value, ModelError> {
    let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
    serde_json::from_str(&text).map_err(|error| ModelError::file(path, format!("{error}; copy or fetch it again")))
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = directory.join("model.safetensors");
    let index = directory.join("model.safetensors.index.json");
    if single.is_file() || !index.is_file() {
        return Ok(vec![single]);
    }
    let raw = read_json(&index)?;
    let map = raw["weight_map"].as_object().ok_or_else(|| ModelError::file(&index, "has no `weight_map`"))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    // A shard is a file of this directory: an index cannot point anywhere else.
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        return Err(ModelError::file(&index, format!("names the shard `{name}` outside its directory")));
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

/// Reads and checks the header alone; the weights stay on disk.
fn read_header(
    path: &Path,
    infos: &mut BTreeMap<String, TensorInfo>,
    places: &mut BTreeMap<String, Place>,
) -> Result<(), ModelError> {
    use std::io::Read;
    let mut file = File::open(path).map_err(ModelError::io(path))?;
    let length = file.metadata().map_err(ModelError::io(path))?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|_| ModelError::file(path, "is truncated; copy or download it again"))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > HEADER_BYTES_MAX.min(length.saturating_sub(8)) {
        let what =
            format!("claims a header of {header_bytes} bytes in a file of {length}; it is damaged or no safetensors");
        return Err(ModelError::file(path, what));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(ModelError::io(path))?;
    // Also checks that tensors follow each other without gaps, each as large as its shape and type say.
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| ModelError::file(path, format!("its header: {error}; copy or fetch it again")))?;
    let data_start = 8 + header_bytes;
    for (name, tensor) in metadata.tensors() {
        let (start, end) = tensor.data_offsets;
        let end_byte = data_start.saturating_add(end as u64);
        if end_byte > length {
            let what = format!("is truncated: {name} ends at byte {end_byte} of {length}; copy or download it again");
            return Err(ModelError::file(path, what));
        }
        let dtype = match tensor.dtype {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::BF16,
            // Buffers of other types (old checkpoints keep some) are of no use to us.
            _ => continue,
        };
        let place = Place { path: path.to_owned(), start: data_start + start as u64, bytes: end - start };
        places.insert(name.clone(), place);
        infos.insert(name.clone(), TensorInfo { name, shape: tensor.shape.clone(), dtype });
    }
    Ok(())
}

/// The values of a safetensors tensor of a floating type.
pub(crate) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match dtype {
        Dtype::F32 => Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F16 => Some(bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Dtype::BF16 => Some(bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::source::random::tests::tiny_model;

    /// A directory of the tiny model in f32, with its tensors' shapes changed.
    fn written(change: impl Fn(&mut BTreeMap<String, Vec<usize>>)) -> tempfile::TempDir {
        let (directory, model) = (tempfile::tempdir().unwrap(), tiny_model(2));
        std::fs::write(directory.path().join("config.json"), model.config().to_huggingface().to_string()).unwrap();
        std::fs::write(directory.path().join("tokenizer.json"), model.tokenizer().json()).unwrap();
        let mut shapes = model.tensors().iter().map(|info| (info.name.clone(), info.shape.clone())).collect();
        change(&mut shapes);
        let zeros = vec![0; 4 * shapes.values().map(|shape| shape.iter().product::<usize>()).max().unwrap()];
        let views = shapes.iter().map(|(name, shape)| {
            let bytes = 4 * shape.iter().product::<usize>();
            (name, TensorView::new(Dtype::F32, shape.clone(), &zeros[..bytes]).unwrap())
        });
        std::fs::write(directory.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap())
            .unwrap();
        directory
    }

    fn check_refused(expected: &str, change: impl Fn(&mut BTreeMap<String, Vec<usize>>)) {
        let error = HuggingFaceModel::open(written(change).path()).err().expect("a refusal").to_string();
        assert!(error.contains(expected), "{error}");
    }

    /// `attention_bias` of Llama and Qwen3 gives the output projection one, too. Without it every logit would be wrong.
    #[test]
    fn a_tensor_that_would_be_left_out_is_refused_by_name() {
        for name in ["model.layers.1.self_attn.o_proj.bias", "model.layers.2.input_layernorm.weight", "lm_head.bias"] {
            check_refused(&format!("has {name}, which"), |shapes| drop(shapes.insert(name.into(), vec![16])));
        }
        for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.rotary_emb.inv_freq"] {
            let directory = written(|shapes| drop(shapes.insert(name.into(), vec![2])));
            assert!(HuggingFaceModel::open(directory.path()).is_ok(), "{name}");
        }
    }

    #[test]
    fn more_blocks_than_tensors_are_refused_before_names_are_made() {
        let directory = written(|_| {});
        let path = directory.path().join("config.json");
        let mut config: Value = read_json(&path).unwrap();
        config["num_hidden_layers"] = (1 << 20).into();
        std::fs::write(&path, config.to_string()).unwrap();
        let error = HuggingFaceModel::open(directory.path()).err().expect("a refusal").to_string();
        assert!(error.contains("has 20 tensors for 1048576 blocks"), "{error}");
    }

    #[test]
    fn a_chat_template_that_fails_is_named_with_its_file() {
        let directory = written(|_| {});
        let path = directory.path().join("tokenizer_config.json");
        std::fs::write(&path, r#"{"chat_template": "{{ raise_exception('no turns') }}"}"#).unwrap();
        let model = HuggingFaceModel::open(directory.path()).unwrap();
        let error = model.tokenizer().chat(&[], true).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("no turns"), "{error}");
    }

    #[test]
    fn a_tensor_of_another_shape_is_refused_before_it_is_read() {
        let name = "model.layers.1.mlp.up_proj.weight";
        for shape in [vec![0], vec![0, 1 << 63], vec![16, 24], vec![24, 16, 1], vec![]] {
            let expected = format!("{name} has shape {shape:?}, and by config.json [24, 16]; copy or download");
            check_refused(&expected, |shapes| drop(shapes.insert(name.into(), shape.clone())));
        }
    }
}
