//! NumPy's archives: a zip of `.npy` members, each a short header and the elements.

use std::sync::Arc;

use crate::error::{Error, Result, Status, bail};
use crate::tensor::DType;

use super::zip::{Member, Zip};
use super::{Bytes, Container, Entry, Stored};

/// The largest header that is read; those of plain arrays have 128 bytes.
const HEADER_LIMIT: usize = 4 << 10;
const DIMENSIONS: usize = 8;
/// What a deflated array may be: an archive of a few bytes could claim terabytes. The widest
/// published dictionary has a million latents, and no weights shrink to a hundredth.
const DEFLATED_SIDE: usize = 1 << 20;
const DEFLATED_RATIO: u64 = 100;
const DEFLATED_ANYWAY: u64 = 64 << 20;

/// Whether all that an archive holds are arrays.
pub(super) fn is_archive(zip: &Zip) -> bool {
    !zip.members().is_empty() && zip.members().iter().all(|member| member.name.ends_with(".npy"))
}

pub(super) fn open(zip: &Zip) -> Result<Container> {
    let mut entries = Vec::new();
    for member in zip.members() {
        let Some(name) = member.name.strip_suffix(".npy") else { continue };
        entries.push(entry(zip, member, name)?);
    }
    Ok(Container::new("npz", Arc::clone(zip.file()), entries))
}

fn entry(zip: &Zip, member: &Member, name: &str) -> Result<Entry> {
    let fault = |text: &str| {
        let text = format!("{}: member {}: {text}", zip.file().path().display(), member.name);
        Error::new(Status::Format, text)
    };
    let mut reader = zip.reader(member);
    let mut magic = [0; 8];
    reader.fill(&mut magic)?;
    if !magic.starts_with(b"\x93NUMPY") {
        return Err(fault("not a NumPy array"));
    }
    let wide = magic[6] >= 2;
    let mut length = [0; 4];
    reader.fill(&mut length[..if wide { 4 } else { 2 }])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > HEADER_LIMIT || !(1..=3).contains(&magic[6]) {
        return Err(fault("its header is of an unknown version, or too long"));
    }
    let mut text = vec![0; length];
    reader.fill(&mut text)?;
    let text = std::str::from_utf8(&text).map_err(|_| fault("its header is not text"))?;
    let header = Header::parse(text).ok_or_else(|| fault("its header is not understood"))?;
    let stored = match header.element() {
        Some(stored) => stored,
        None if header.descr.contains('O') => bail!(
            UnsafePickle,
            "{}: member {}: an array of Python objects, which is a pickle; only numbers are read",
            zip.file().path().display(),
            member.name
        ),
        None => return Err(fault(&format!("elements of the type {} are not read", header.descr))),
    };
    let skip = (if wide { 12 } else { 10 }) + length as u64;
    let bytes = header.shape.iter().try_fold(stored.size(), |n, s| n.checked_mul(*s));
    if bytes.map(|n| n as u64) != member.len.checked_sub(skip) {
        return Err(fault(&format!(
            "its header says {:?} elements of {} bytes, it holds {} bytes",
            header.shape,
            stored.size(),
            member.len.saturating_sub(skip)
        )));
    }
    if header.shape.len() > DIMENSIONS {
        return Err(fault(&format!("it has more than {DIMENSIONS} dimensions")));
    }
    if member.deflated && is_bomb(member, &header.shape) {
        return Err(fault(&format!(
            "{:?} deflated to {} bytes is not read: sides of up to {DEFLATED_SIDE}, and no more \
             than {DEFLATED_RATIO} times the bytes in the archive; save it with numpy.savez, which \
             does not compress",
            header.shape, member.stored_len
        )));
    }
    let bytes = match member.deflated {
        false => Bytes::Plain { offset: member.start + skip },
        true => Bytes::Deflated { start: member.start, stored_len: member.stored_len, skip },
    };
    let fortran = header.fortran && header.shape.len() > 1;
    let (name, file) = (name.to_string(), Arc::clone(zip.file()));
    Ok(Entry { name, stored, shape: header.shape, turned: fortran, file, bytes })
}

/// Whether a deflated array takes more time or memory than a file of its size may.
fn is_bomb(member: &Member, shape: &[usize]) -> bool {
    let most = member.stored_len.saturating_mul(DEFLATED_RATIO).max(DEFLATED_ANYWAY);
    member.len > most || shape.iter().any(|side| *side > DEFLATED_SIDE)
}

/// `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`
#[derive(Default)]
struct Header {
    descr: String,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> Option<Header> {
        let mut rest = text.trim().strip_prefix('{')?.strip_suffix('}')?.trim();
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        while !rest.is_empty() {
            let (key, after) = quoted(rest)?;
            rest = after.trim_start().strip_prefix(':')?.trim_start();
            rest = match key {
                "descr" => {
                    let (value, after) = quoted(rest)?;
                    descr = Some(value.to_string());
                    after
                }
                "fortran_order" => {
                    let (value, after) = rest.split_at_checked(rest.find([',', ' '])?)?;
                    fortran = Some(match value {
                        "True" => true,
                        "False" => false,
                        _ => return None,
                    });
                    after
                }
                "shape" => {
                    let (inside, after) = rest.strip_prefix('(')?.split_once(')')?;
                    let sizes = inside.split(',').map(str::trim).filter(|n| !n.is_empty());
                    shape = Some(sizes.map(|n| n.parse().ok()).collect::<Option<Vec<usize>>>()?);
                    after
                }
                _ => return None,
            };
            rest = rest.trim_start().strip_prefix(',').unwrap_or(rest.trim_start()).trim_start();
        }
        Some(Header { descr: descr?, fortran: fortran?, shape: shape? })
    }

    /// Little-endian numbers; bytes have no order.
    fn element(&self) -> Option<Stored> {
        Some(match self.descr.as_str() {
            "<f4" => Stored::Float(DType::F32),
            "<f2" => Stored::Float(DType::F16),
            "<f8" => Stored::Float(DType::F64),
            "|b1" => Stored::Bool,
            "|u1" => Stored::U8,
            "|i1" => Stored::I8,
            "<i2" => Stored::I16,
            "<i4" => Stored::I32,
            "<i8" => Stored::I64,
            _ => return None,
        })
    }
}

/// A string in quotes, and what follows it.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote)
}
