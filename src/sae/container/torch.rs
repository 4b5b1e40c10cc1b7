//! PyTorch's zip files: `data.pkl` describes the values, `data/<key>` holds a storage each.
//!
//! The pickle is read as data ([`super::pickle`]); nothing in it runs.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result, Status, bail};

use super::super::file::DataFile;
use super::pickle::{self, Leaf, PickledArray, PickledTensor, REMEDY};
use super::zip::{Member, Zip};
use super::{Bytes, Container, Entry};

pub(super) fn open(zip: &Zip) -> Result<Container> {
    let name = zip.file().path().display().to_string();
    let fault = |text: String| Error::new(Status::Format, format!("{name}: {text}"));
    let tops = zip.members().iter().filter(|member| is_top(&member.name, "data.pkl"));
    let pickle = match tops.collect::<Vec<_>>()[..] {
        [pickle] if !pickle.deflated => pickle,
        [_] => return Err(fault("its data.pkl is deflated, which torch.save never does".into())),
        [] => return Err(fault("a zip archive without data.pkl is no file of torch.save".into())),
        _ => return Err(fault("it holds more than one data.pkl".into())),
    };
    let prefix = pickle.name.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(order) = zip.find(&format!("{prefix}byteorder"))
        && zip.read(order, 16)? != b"little"
    {
        return Err(fault("its numbers are not little-endian".into()));
    }
    let bytes = zip.read(pickle, pickle::LIMIT)?;
    let leaves = pickle::leaves(&bytes)
        .map_err(|e| Error::new(e.status, format!("{name}: data.pkl: {}", e.message)))?;
    let mut container = Container::new("torch", Arc::clone(zip.file()), Vec::new());
    let mut values = Map::new();
    for (path, leaf) in leaves {
        let value = match leaf {
            Leaf::Tensor(tensor) => {
                let member = zip.find(&format!("{prefix}data/{}", tensor.storage));
                container.entries.push(entry(zip, &path, tensor, member).map_err(fault)?);
                continue;
            }
            Leaf::Array(array) => {
                let PickledArray { dtype: stored, shape, turned, bytes } = array;
                let (file, bytes) = (Arc::clone(zip.file()), Bytes::Here(bytes));
                container.entries.push(Entry { name: path, stored, shape, turned, file, bytes });
                continue;
            }
            Leaf::Bool(b) => b.into(),
            Leaf::Int(n) => n.into(),
            Leaf::Real(x) => x.into(),
            Leaf::Text(text) => text.into(),
            Leaf::Null => Value::Null,
        };
        values.insert(path, value);
    }
    container.values = values;
    Ok(container)
}

/// Whether a member is this file in the archive's one folder, or at its top.
fn is_top(member: &str, file: &str) -> bool {
    let folder = member.strip_suffix(file).map(|folder| folder.trim_end_matches('/'));
    folder.is_some_and(|folder| !folder.contains('/'))
}

fn entry(
    zip: &Zip,
    path: &str,
    tensor: PickledTensor<'_>,
    member: Option<&Member>,
) -> std::result::Result<Entry, String> {
    let Some(member) = member else {
        return Err(format!("tensor {path}: its storage {} is missing", tensor.storage));
    };
    let size = tensor.dtype.size() as u64;
    if tensor.numel.checked_mul(size) != Some(member.len) || member.deflated {
        return Err(format!(
            "tensor {path}: its storage holds {} bytes, not {} elements of {size}",
            member.len, tensor.numel
        ));
    }
    let offset = member.start + tensor.offset * size;
    let PickledTensor { dtype: stored, shape, stride, .. } = tensor;
    let plain = |shape: &[usize], stride: &[usize]| {
        let mut step = 1;
        shape.iter().zip(stride).rev().all(|(n, s)| {
            let fits = *n <= 1 || *s == step;
            step = step.saturating_mul(*n);
            fits
        })
    };
    let backwards = |x: &[usize]| x.iter().rev().copied().collect::<Vec<_>>();
    let (turned, bytes) = if plain(&shape, &stride) {
        (false, Bytes::Plain { offset })
    } else if plain(&backwards(&shape), &backwards(&stride)) {
        (true, Bytes::Plain { offset })
    } else {
        (false, Bytes::Strided { offset, stride })
    };
    let (name, file) = (path.to_string(), Arc::clone(zip.file()));
    Ok(Entry { name, stored, shape, turned, file, bytes })
}

/// Refuses a pickle that is not in a zip archive.
pub(super) fn refuse_legacy(file: &DataFile) -> Result<Container> {
    bail!(
        UnsafePickle,
        "{}: a pickle from before PyTorch 1.6, or of something else than torch.save; where running its \
         code is safe, write it anew and give it its name: {REMEDY}",
        file.path().display()
    )
}
