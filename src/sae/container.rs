//! The safetensors container: a length, a JSON header, then the tensors' bytes without gaps.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::error::{Result, bail};
use crate::tensor::DType;

use super::array::Array;
use super::file::DataFile;

/// The format's own limit.
const HEADER_LIMIT: u64 = 100_000_000;
const PREFIX: u64 = 8;

/// An opened file whose header was read and checked; its tensors were not read.
pub(crate) struct Container {
    file: Arc<DataFile>,
    header: Metadata,
    data_start: u64,
}

impl Container {
    pub fn open(path: &Path) -> Result<Container> {
        let file = DataFile::open(path)?;
        refuse_other_containers(&file)?;
        let name = path.display();
        if file.len() < PREFIX {
            bail!(Format, "{name}: {} bytes are too few for a safetensors file", file.len());
        }
        let mut prefix = [0; PREFIX as usize];
        file.read_at(&mut prefix, 0)?;
        let length = u64::from_le_bytes(prefix);
        if length > HEADER_LIMIT || length > file.len() - PREFIX {
            bail!(
                Format,
                "{name}: claims a header of {length} bytes in a file of {}; not a safetensors \
                 file, or truncated: fetch it again",
                file.len()
            );
        }
        let mut text = vec![0; length as usize];
        file.read_at(&mut text, PREFIX)?;
        let header: Metadata = match serde_json::from_slice(&text) {
            Ok(header) => header,
            Err(e) => bail!(Format, "{name}: the safetensors header is invalid: {e}"),
        };
        let data_start = PREFIX + length;
        let (claimed, present) = (header.data_len() as u64, file.len() - data_start);
        if claimed != present {
            bail!(
                Format,
                "{name}: the header describes {claimed} bytes of tensors, the file holds {present}; \
                 it is {}: fetch it again",
                if present < claimed { "truncated" } else { "followed by foreign bytes" }
            );
        }
        Ok(Container { file: Arc::new(file), header, data_start })
    }

    pub fn file(&self) -> &Arc<DataFile> {
        &self.file
    }

    /// The strings under `__metadata__`.
    pub fn metadata(&self) -> Option<&HashMap<String, String>> {
        self.header.metadata().as_ref()
    }

    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// A tensor that may be absent.
    pub fn find(&self, name: &str) -> Result<Option<Array>> {
        self.header.info(name).map(|info| self.array(name, info)).transpose()
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
        let names = self.header.offset_keys();
        match names.len() {
            0 => "no tensors".to_string(),
            n if n <= SHOWN => names.join(", "),
            n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
        }
    }

    fn array(&self, name: &str, info: &TensorInfo) -> Result<Array> {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            Dtype::U8 => DType::U8,
            Dtype::BOOL => DType::Bool,
            Dtype::I64 => DType::I64,
            other => bail!(
                Format,
                "{}: tensor {name} has the element type {other:?}; convert it to float32, float16, \
                 bfloat16 or float64",
                self.file.path().display()
            ),
        };
        let offset = self.data_start + info.data_offsets.0 as u64;
        Ok(Array::in_file(name, dtype, &info.shape, Arc::clone(&self.file), offset))
    }
}

/// Names what is often given instead. Never unpickles: that would run the file's code.
fn refuse_other_containers(file: &DataFile) -> Result<()> {
    let mut start = vec![0; file.len().min(PREFIX + 1) as usize];
    file.read_at(&mut start, 0)?;
    // Every safetensors header begins with this brace; its length before it can look like anything.
    if start.get(PREFIX as usize) == Some(&b'{') {
        return Ok(());
    }
    let name = file.path().display();
    if file.path().extension().is_some_and(|e| e.eq_ignore_ascii_case("npz")) {
        bail!(
            Unsupported,
            "{name}: NumPy archives are not read yet; save the arrays as safetensors (in Python: \
             safetensors.numpy.save_file(dict(numpy.load(path)), out)) and state the recipe"
        );
    }
    let zip = start.starts_with(b"PK\x03\x04");
    let pickle = matches!(start[..], [0x80, 2..=5, ..]);
    if zip || pickle {
        bail!(
            UnsafePickle,
            "{name}: a PyTorch pickle, which can run any code when it is loaded, and is not read \
             yet; convert it once where that is safe: \
             safetensors.torch.save_file(torch.load(path, weights_only=True), out)"
        );
    }
    Ok(())
}
