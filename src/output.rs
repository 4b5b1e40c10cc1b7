//! Output files that appear whole or not at all, and the header of safetensors files.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::error::{Error, Result, bail};
use crate::tensor::DType;

/// Writes through a temporary file in the same folder, which takes the name only when complete.
pub fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>,
) -> Result<()> {
    // By its kind: the error itself speaks of the temporary file.
    let fail = |e: &io::Error| Error::io(path, "write the output file", &e.kind().into());
    let file = temporary_beside(path).map_err(|e| fail(&e))?;
    let mut buffer = BufWriter::new(file.as_file());
    write(&mut buffer)?;
    buffer.flush().map_err(|e| fail(&e))?;
    drop(buffer);
    file.as_file().sync_data().map_err(|e| fail(&e))?;
    file.persist(path).map_err(|e| fail(&e.error))?;
    Ok(())
}

/// An empty file in the folder of `path`, with the permissions of a new file; removed unless it takes
/// a name.
pub fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".blockem-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// A tensor of a file that is going to be written.
pub struct TensorEntry {
    pub name: &'static str,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl TensorEntry {
    pub fn bytes(&self) -> Result<u64> {
        let count = self.shape.iter().try_fold(1u64, |n, s| n.checked_mul(*s as u64));
        match count.and_then(|n| n.checked_mul(self.dtype.size() as u64)) {
            Some(bytes) => Ok(bytes),
            None => bail!(Shape, "{}: {:?} is larger than any file", self.name, self.shape),
        }
    }
}

/// The length and the JSON with which a safetensors file begins, padded so that the tensors, which
/// follow in this order without gaps, start at a multiple of 8. The same input gives the same bytes.
pub fn safetensors_header(
    metadata: Map<String, Value>,
    tensors: &[TensorEntry],
) -> Result<Vec<u8>> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), Value::Object(metadata));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes()?;
        let entry = json!({
            "dtype": safetensors_name(tensor.dtype),
            "shape": tensor.shape,
            "data_offsets": [start, end],
        });
        header.insert(tensor.name.into(), entry);
        start = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    Ok(bytes)
}

fn safetensors_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F64 => "F64",
        DType::U8 => "U8",
        DType::Bool => "BOOL",
        DType::I64 => "I64",
    }
}
