//! safetensors: a length, a JSON header, then the tensors' bytes without gaps.

use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata};

use crate::error::{Result, bail};
use crate::tensor::DType;

use super::super::file::DataFile;
use super::{Bytes, Container, Entry, Stored};

/// The format allows 100 MB; 5,000 tensors need less than this, and what is parsed takes up to 90
/// times its bytes.
const HEADER_LIMIT: u64 = 512 << 10;
const PREFIX: u64 = 8;

pub(super) fn open(file: Arc<DataFile>) -> Result<Container> {
    let name = file.path().display();
    if file.len() < PREFIX {
        bail!(Format, "{name}: {} bytes are too few for a safetensors file", file.len());
    }
    let mut prefix = [0; PREFIX as usize];
    file.read_at(&mut prefix, 0)?;
    let length = u64::from_le_bytes(prefix);
    if length > HEADER_LIMIT && length <= file.len() - PREFIX {
        bail!(
            Format,
            "{name}: has a header of {length} bytes, {HEADER_LIMIT} at most are read; write it again \
             with the SAE's own tensors and less metadata"
        );
    }
    if length > file.len() - PREFIX {
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
    let entry = |name: String| {
        let info = header.info(&name)?;
        let offset = data_start + info.data_offsets.0 as u64;
        let (stored, shape) = (stored(info.dtype), info.shape.clone());
        let (file, bytes) = (Arc::clone(&file), Bytes::Plain { offset });
        Some(Entry { name, stored, shape, turned: false, file, bytes })
    };
    let entries = header.offset_keys().into_iter().filter_map(entry).collect();
    let mut container = Container::new("safetensors", Arc::clone(&file), entries);
    container.metadata = header.metadata().clone();
    Ok(container)
}

fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F32 => Stored::Float(DType::F32),
        Dtype::F16 => Stored::Float(DType::F16),
        Dtype::BF16 => Stored::Float(DType::BF16),
        Dtype::F64 => Stored::Float(DType::F64),
        Dtype::BOOL => Stored::Bool,
        Dtype::U8 => Stored::U8,
        Dtype::I8 => Stored::I8,
        Dtype::I16 => Stored::I16,
        Dtype::I32 => Stored::I32,
        Dtype::I64 => Stored::I64,
        other => Stored::Foreign(other),
    }
}
