//! Several files of weights under one index, as Hugging Face's libraries write them:
//! `model.safetensors.index.json`, whose `weight_map` tells each tensor's file.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Result, bail};
use crate::json;

use super::super::file::DataFile;
use super::Container;

/// The largest index; parsed, it takes up to 90 times its bytes.
const LIMIT: u64 = 512 << 10;
/// An SAE of a terabyte would have 256 files of 4 GiB.
const SHARDS: usize = 256;

/// Whether a file begins as a JSON object does, and not as a length.
pub(super) fn is_json(start: &[u8]) -> bool {
    let text = json::without_mark(start).trim_ascii_start();
    let is_text = |b: &u8| !b.is_ascii_control() || b.is_ascii_whitespace();
    text.starts_with(b"{") && start.iter().all(is_text)
}

/// The tensors of all files of an index.
pub(super) fn open(index: Arc<DataFile>) -> Result<Container> {
    let name = index.path().display().to_string();
    let files = files_of(&index, &name)?;
    let folder = index.path().parent().unwrap_or(Path::new("")).to_path_buf();
    let mut whole: Option<Container> = None;
    let mut names = HashSet::new();
    for (file, tensors) in files {
        let path = folder.join(&file);
        if !path.is_file() {
            bail!(
                Io,
                "{name}: the file {file}, which holds {} and others, is missing beside it; fetch all \
                 files of the index",
                tensors[0]
            );
        }
        let shard = Container::open_one(&path)?;
        if let Some(missing) = tensors.iter().find(|tensor| !shard.has(tensor)) {
            bail!(
                TensorMissing,
                "{name}: tensor {missing} is not in {file}, which holds {}; fetch the index and all \
                 its files anew",
                shard.list()
            );
        }
        if let Some(twice) = shard.entries.iter().find(|entry| !names.insert(entry.name.clone())) {
            bail!(Format, "{name}: tensor {} is in {file} and in another file", twice.name);
        }
        match &mut whole {
            None => {
                whole = Some(Container { file: Arc::clone(&index), ..shard });
            }
            Some(whole) if whole.kind != shard.kind => bail!(
                Format,
                "{name}: {file} is a file of {}, and others are of {}",
                shard.kind,
                whole.kind
            ),
            Some(whole) => {
                whole.entries.extend(shard.entries);
                whole.values.extend(shard.values);
                join_metadata(&mut whole.metadata, shard.metadata, &name)?;
            }
        }
    }
    match whole {
        Some(whole) => Ok(whole),
        None => bail!(Format, "{name}: the key weight_map is empty"),
    }
}

/// Each file of the index with its tensors, in the index's order.
fn files_of(index: &DataFile, name: &str) -> Result<Vec<(String, Vec<String>)>> {
    if index.len() > LIMIT {
        bail!(Format, "{name}: {} bytes are no index of weights: {LIMIT} at most", index.len());
    }
    let mut text = vec![0; index.len() as usize];
    index.read_at(&mut text, 0)?;
    let file: Map<String, Value> = match json::parse(&text) {
        Ok(file) => file,
        Err(reason) => bail!(Format, "{name}: {reason}"),
    };
    let Some(Value::Object(map)) = file.get("weight_map") else {
        bail!(
            Format,
            "{name}: is JSON without an object weight_map, and so neither weights nor an index of \
             their files; give the SAE's folder or its weights"
        );
    };
    let mut files: Vec<(String, Vec<String>)> = Vec::new();
    let mut place: HashMap<&str, usize> = HashMap::new();
    for (tensor, file) in map {
        let Some(file) = file.as_str().filter(|file| is_plain_name(file)) else {
            bail!(
                Format,
                "{name}: the file of tensor {tensor} is {file}; it must be the name of a file beside \
                 the index"
            );
        };
        let at = *place.entry(file).or_insert_with(|| {
            files.push((file.to_string(), Vec::new()));
            files.len() - 1
        });
        if files.len() > SHARDS {
            bail!(Format, "{name}: it names more than {SHARDS} files");
        }
        files[at].1.push(tensor.clone());
    }
    Ok(files)
}

/// A name that cannot lead out of the index's folder.
fn is_plain_name(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    plain && !file.contains(['/', '\\'])
}

/// Shards may repeat what they say, not contradict each other.
fn join_metadata(
    whole: &mut Option<HashMap<String, String>>,
    shard: Option<HashMap<String, String>>,
    name: &str,
) -> Result<()> {
    let whole = whole.get_or_insert_default();
    for (key, value) in shard.unwrap_or_default() {
        if whole.get(&key).is_some_and(|known| *known != value) {
            bail!(Format, "{name}: its files disagree on the key {key} of their __metadata__");
        }
        whole.insert(key, value);
    }
    Ok(())
}
