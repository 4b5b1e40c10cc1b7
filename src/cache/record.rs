//! A record carries a checksum of itself and of its key: a changed bit is found when it is read,
//! and so is a record that stands under a foreign key.

use flate2::Crc;

use super::Key;
use crate::error::{Result, bail};
use crate::tensor::DType;

/// What is stored of an example. A number is never given again; those that this version only names
/// belong to later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// z, latent by latent.
    Latents = 1,
}

impl Kind {
    /// What stands before the members of a group.
    pub fn head(self) -> [u8; 4] {
        [self as u8, 0, 0, 0]
    }

    /// What follows that head.
    pub fn body(self, record: &[u8]) -> Result<&[u8]> {
        let Some((head, body)) = record.split_first_chunk::<4>() else {
            bail!(Format, "damaged: a record has no kind");
        };
        self.expect(head[0])?;
        expect_zero(&head[1..])?;
        Ok(body)
    }

    fn expect(self, found: u8) -> Result<()> {
        if found != self as u8 {
            bail!(
                Unsupported,
                "it holds {} of an example, which this version does not read; use the version \
                 that filled it, or make a new file (mode CREATE) and fill it",
                name_of(found)
            );
        }
        Ok(())
    }
}

fn name_of(kind: u8) -> String {
    match kind {
        1 => "z".into(),
        2 => "hidden states".into(),
        3 => "keys and values of a prefix".into(),
        other => format!("something of kind {other}"),
    }
}

/// Before the elements of a record of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    dtype: DType,
    /// Elements of one token.
    width: u32,
}

impl Header {
    pub fn latents(columns: usize) -> Header {
        let width = u32::try_from(columns).expect("fewer latents than 2^32");
        Header { kind: Kind::Latents, dtype: DType::F32, width }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        bytes[1] = self.dtype as u8;
        bytes[4..].copy_from_slice(&self.width.to_le_bytes());
        bytes
    }

    /// The elements of a record that has this header.
    pub fn elements(self, record: &[u8]) -> Result<&[u8]> {
        let Some((head, elements)) = record.split_first_chunk::<HEADER>() else {
            bail!(Format, "damaged: a record has no header");
        };
        self.kind.expect(head[0])?;
        if head[1] != self.dtype as u8 {
            let found = DType::from_code(head[1].into())
                .map_or_else(|| format!("the unknown dtype {}", head[1]), |d| d.name().into());
            bail!(
                Unsupported,
                "it holds {} as {found}, and this version reads {}",
                name_of(head[0]),
                self.dtype.name()
            );
        }
        expect_zero(&head[2..4])?;
        if head[4..] != self.width.to_le_bytes() {
            bail!(Format, "damaged: a record has another width than its group");
        }
        Ok(elements)
    }
}

const HEADER: usize = 8;

/// Bytes that later versions may use.
fn expect_zero(bytes: &[u8]) -> Result<()> {
    if bytes.iter().any(|b| *b != 0) {
        bail!(Unsupported, "a record was written by a later version; make a new file and fill it");
    }
    Ok(())
}

/// CRC-32 of key and payload, then the payload.
pub fn seal(key: &[u8], payload: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let mut sealed = vec![0; CHECKSUM];
    sealed.extend(payload);
    let checksum = checksum(key, &sealed[CHECKSUM..]);
    sealed[..CHECKSUM].copy_from_slice(&checksum);
    sealed
}

/// The payload, if the record is what was sealed under this key.
pub fn unseal<'a>(key: &[u8], sealed: &'a [u8]) -> Result<&'a [u8]> {
    if sealed.len() < CHECKSUM || sealed[..CHECKSUM] != checksum(key, payload(sealed)) {
        bail!(
            Format,
            "damaged: the checksum of a record does not match; remove the file and fill it again"
        );
    }
    Ok(payload(sealed))
}

fn payload(sealed: &[u8]) -> &[u8] {
    &sealed[CHECKSUM..]
}

/// Of a sealed record whose header was accepted.
pub fn elements(sealed: &[u8]) -> &[u8] {
    &sealed[CHECKSUM + HEADER..]
}

/// The key of one group of one example.
pub fn joined(example: &Key, group: &Key) -> [u8; 64] {
    let mut key = [0; 64];
    key[..32].copy_from_slice(example);
    key[32..].copy_from_slice(group);
    key
}

const CHECKSUM: usize = 4;

fn checksum(key: &[u8], payload: &[u8]) -> [u8; CHECKSUM] {
    let mut crc = Crc::new();
    crc.update(key);
    crc.update(payload);
    crc.sum().to_le_bytes()
}
