//! Containers of tensors: safetensors, NumPy's archives, PyTorch's zip files. Opening one reads and
//! checks its directory; its tensors are read in parts, when they are asked for.

mod npy;
mod pickle;
mod safetensors;
mod shards;
#[cfg(test)]
mod tests;
mod torch;
mod zip;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result, Status, bail};
use crate::tensor::DType;

use super::array::{Array, zeroed};
use super::file::DataFile;
pub(super) use zip::MemberReader;
use zip::Zip;

/// Names below which trainers and wrapping modules keep a whole model.
const PREFIXES: [&str; 7] = [
    "state_dict.",
    "model_state_dict.",
    "sae_state_dict.",
    "sae.",
    "module.",
    "model.",
    "autoencoder.",
];
/// What trainers keep beside it.
const TRAINERS: [&str; 8] = [
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "scheduler",
    "scheduler_state_dict",
    "lr_scheduler",
    "lr_schedulers",
    "scaler",
];
/// Modules that torch.compile, FSDP and activation checkpointing put around another, at any depth.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Tensors that are turned into numbers of another type, or gathered element by element, are small.
const SMALL: usize = 16 << 20;

/// An opened file whose directory was read and checked; its tensors were not read.
pub(crate) struct Container {
    /// safetensors, npz or torch.
    kind: &'static str,
    /// The file that was opened; of shards their index.
    file: Arc<DataFile>,
    entries: Vec<Entry>,
    metadata: Option<HashMap<String, String>>,
    /// Numbers and strings that lie beside the tensors.
    values: Map<String, Value>,
}

/// Element types of containers; those that [`DType`] lacks are integers, or not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Float(DType),
    Bool,
    U8,
    I8,
    I16,
    I32,
    I64,
    Foreign(::safetensors::Dtype),
}

impl Stored {
    fn size(self) -> usize {
        match self {
            Stored::Float(dtype) => dtype.size(),
            Stored::Bool | Stored::U8 | Stored::I8 => 1,
            Stored::I16 => 2,
            Stored::I32 => 4,
            Stored::I64 => 8,
            // Never gathered.
            Stored::Foreign(_) => 1,
        }
    }
}

/// A tensor of a container.
struct Entry {
    name: String,
    stored: Stored,
    shape: Vec<usize>,
    /// The bytes are those of the transpose.
    turned: bool,
    file: Arc<DataFile>,
    bytes: Bytes,
}

/// Where a tensor's elements are.
enum Bytes {
    /// Row-major, from this offset of the file on.
    Plain { offset: u64 },
    /// A deflated stream, whose first `skip` bytes are a header.
    Deflated { start: u64, stored_len: u64, skip: u64 },
    /// Element by element; strides count elements.
    Strided { offset: u64, stride: Vec<usize> },
    /// Row-major, already in memory: what lies within a pickle.
    Here(Vec<u8>),
}

impl Container {
    /// Told apart by their first bytes, whatever their names.
    pub fn open(path: &Path) -> Result<Container> {
        let file = Arc::new(DataFile::open(path)?);
        match shards::is_json(&start_of(&file)?) {
            true => shards::open(file),
            false => Container::of_file(file),
        }
    }

    /// The same of a file that is no index of others.
    fn open_one(path: &Path) -> Result<Container> {
        Container::of_file(Arc::new(DataFile::open(path)?))
    }

    fn of_file(file: Arc<DataFile>) -> Result<Container> {
        let start = start_of(&file)?;
        // Every safetensors header begins with this brace; its length before it can look like anything.
        if start.get(8) == Some(&b'{') {
            return safetensors::open(file);
        }
        if start.starts_with(b"PK\x03\x04") {
            let zip = Zip::open(file)?;
            return match npy::is_archive(&zip) {
                true => npy::open(&zip),
                false => torch::open(&zip),
            };
        }
        if matches!(start[..], [0x80, 2..=5, ..]) {
            return torch::refuse_legacy(&file);
        }
        safetensors::open(file)
    }

    fn new(kind: &'static str, file: Arc<DataFile>, entries: Vec<Entry>) -> Container {
        Container { kind, file, entries, metadata: None, values: Map::new() }
    }

    /// The same without the dictionaries that trainers save a state dict in, and without the names of
    /// modules that wrap a model.
    pub fn unwrapped(mut self) -> Result<Container> {
        self.rename(|name| Some(without_wrappers(name)));
        while let Some(prefix) = PREFIXES.into_iter().find(|prefix| self.lies_below(prefix)) {
            self.entries.retain(|entry| entry.name.starts_with(prefix));
            self.rename(|name| name.strip_prefix(prefix).map(str::to_string));
        }
        let mut names = HashSet::new();
        if let Some(twice) = self.entries.iter().find(|entry| !names.insert(&entry.name)) {
            bail!(
                Format,
                "{}: tensor {} is in it twice, once below the name of a wrapper; remove one",
                self.file.path().display(),
                twice.name
            );
        }
        Ok(self)
    }

    /// Whether the model is what lies below this name: all tensors, or all but a trainer's.
    fn lies_below(&self, prefix: &str) -> bool {
        let of_trainer = |name: &str| {
            let first = name.split('.').next().unwrap_or(name);
            TRAINERS.contains(&first)
        };
        let mut inside = self.entries.iter().filter(|e| e.name.starts_with(prefix)).peekable();
        inside.peek().is_some()
            && self.entries.iter().all(|e| e.name.starts_with(prefix) || of_trainer(&e.name))
    }

    /// Names tensors, and the values beside them, anew; a value without a new name keeps its own.
    fn rename(&mut self, new: impl Fn(&str) -> Option<String>) {
        for entry in &mut self.entries {
            entry.name = new(&entry.name).unwrap_or(std::mem::take(&mut entry.name));
        }
        let (inner, outer): (Vec<_>, Vec<_>) = std::mem::take(&mut self.values)
            .into_iter()
            .map(|(name, value)| (new(&name), name, value))
            .partition(|(new, ..)| new.is_some());
        // The model's own come last, and stay.
        let named = outer.into_iter().chain(inner);
        self.values = named.map(|(new, name, value)| (new.unwrap_or(name), value)).collect();
    }

    pub fn kind(&self) -> &'static str {
        self.kind
    }

    pub fn file(&self) -> &Arc<DataFile> {
        &self.file
    }

    /// The strings under `__metadata__` of a safetensors file.
    pub fn metadata(&self) -> Option<&HashMap<String, String>> {
        self.metadata.as_ref()
    }

    /// A number or a string beside the tensors.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry.name == name)
    }

    /// A tensor's shape, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.iter().find(|entry| entry.name == name).map(|entry| &entry.shape[..])
    }

    /// A tensor that may be absent.
    pub fn find(&self, name: &str) -> Result<Option<Array>> {
        let entry = self.entries.iter().find(|entry| entry.name == name);
        entry.map(|entry| self.array(entry)).transpose()
    }

    /// A tensor that must be there.
    pub fn need(&self, name: &str) -> Result<Array> {
        match self.find(name)? {
            Some(array) => Ok(array),
            None => bail!(
                TensorMissing,
                "{}: tensor {name} is missing; the file holds {}",
                self.file.path().display(),
                self.list()
            ),
        }
    }

    /// The names of all tensors, for messages.
    pub fn list(&self) -> String {
        const SHOWN: usize = 12;
        let names: Vec<&str> = self.entries.iter().map(|entry| entry.name.as_str()).collect();
        match names.len() {
            0 => "no tensors".to_string(),
            n if n <= SHOWN => names.join(", "),
            n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        }
    }

    fn array(&self, entry: &Entry) -> Result<Array> {
        let (name, shape, file) = (&entry.name[..], &entry.shape[..], Arc::clone(&entry.file));
        let dtype = match entry.stored {
            Stored::Float(dtype) => dtype,
            Stored::Bool => DType::Bool,
            Stored::U8 => DType::U8,
            Stored::I64 => DType::I64,
            Stored::I8 | Stored::I16 | Stored::I32 => return self.widened(entry),
            Stored::Foreign(other) => bail!(
                Format,
                "{}: tensor {name} has the element type {other:?}; convert it to float32, float16, \
                 bfloat16 or float64",
                entry.file.path().display()
            ),
        };
        Ok(match &entry.bytes {
            Bytes::Plain { offset } => {
                Array::in_file(name, dtype, shape, file, *offset).turned(entry.turned)
            }
            Bytes::Deflated { start, stored_len, skip } => {
                Array::deflated(name, dtype, shape, file, [*start, *stored_len, *skip])
                    .turned(entry.turned)
            }
            Bytes::Strided { .. } => Array::in_memory(name, dtype, shape, self.small_bytes(entry)?),
            Bytes::Here(bytes) => {
                Array::in_memory(name, dtype, shape, bytes.clone()).turned(entry.turned)
            }
        })
    }

    /// Narrow integers as 64-bit ones.
    fn widened(&self, entry: &Entry) -> Result<Array> {
        let bytes = self.small_bytes(entry)?;
        let wide = |element: &[u8]| match *element {
            [a] => i8::from_le_bytes([a]) as i64,
            [a, b] => i16::from_le_bytes([a, b]) as i64,
            [a, b, c, d] => i32::from_le_bytes([a, b, c, d]) as i64,
            _ => 0,
        };
        let elements = bytes.chunks_exact(entry.stored.size());
        let wide: Vec<u8> = elements.flat_map(|element| wide(element).to_le_bytes()).collect();
        let array = Array::in_memory(&entry.name, DType::I64, &entry.shape, wide);
        Ok(array.turned(entry.turned && !matches!(entry.bytes, Bytes::Strided { .. })))
    }

    /// All elements of a small tensor, row-major but for `turned`.
    fn small_bytes(&self, entry: &Entry) -> Result<Vec<u8>> {
        let size = entry.stored.size();
        let count: usize = entry.shape.iter().product();
        if count > SMALL / 8 {
            let text = format!(
                "{}: tensor {} of shape {:?} is too large to be gathered element by element; save \
                 it again after .contiguous(), as float32, float16, bfloat16 or float64",
                entry.file.path().display(),
                entry.name,
                entry.shape
            );
            return Err(Error::new(Status::Unsupported, text));
        }
        let mut bytes = zeroed(count * size, entry.file.path())?;
        match &entry.bytes {
            Bytes::Plain { offset } => entry.file.read_at(&mut bytes, *offset)?,
            Bytes::Deflated { start, stored_len, skip } => {
                let mut reader =
                    MemberReader::new(&entry.file, *start, *stored_len, true, &entry.name);
                reader.skip(*skip)?;
                reader.fill(&mut bytes)?;
            }
            Bytes::Strided { offset, stride } => {
                read_strided(&entry.file, *offset, &entry.shape, stride, size, &mut bytes)?;
            }
            Bytes::Here(here) => bytes.copy_from_slice(here),
        }
        Ok(bytes)
    }
}

/// The first bytes, which tell what a file is.
fn start_of(file: &DataFile) -> Result<Vec<u8>> {
    let mut start = vec![0; file.len().min(9) as usize];
    file.read_at(&mut start, 0)?;
    Ok(start)
}

/// A name without the modules that only wrap others.
fn without_wrappers(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    parts.join(".")
}

/// Elements of `size` bytes in the order of the shape; strides count elements.
fn read_strided(
    file: &DataFile,
    offset: u64,
    shape: &[usize],
    stride: &[usize],
    size: usize,
    to: &mut [u8],
) -> Result<()> {
    if to.is_empty() {
        return Ok(());
    }
    let last: usize = shape.iter().zip(stride).map(|(n, s)| (n - 1) * s).sum();
    // One read is enough where the elements lie close together.
    let span = (last + 1) * size;
    let mut near = zeroed(if span <= SMALL { span } else { 0 }, file.path())?;
    file.read_at(&mut near, offset)?;
    for (i, element) in to.chunks_exact_mut(size).enumerate() {
        let mut left = i;
        let mut at = 0;
        for (n, s) in shape.iter().zip(stride).rev() {
            at += left % n * s;
            left /= n;
        }
        match near.get(at * size..(at + 1) * size) {
            Some(bytes) => element.copy_from_slice(bytes),
            None => file.read_at(element, offset + (at * size) as u64)?,
        }
    }
    Ok(())
}
