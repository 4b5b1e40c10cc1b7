//! A record carries a checksum of itself and of its key: a changed bit is found when it is read,
//! and so is a record that stands under a foreign key.

use flate2::Crc;

use super::Key;
use crate::error::{Result, bail};

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

/// Of a record that [`unseal`] accepted.
pub fn payload(sealed: &[u8]) -> &[u8] {
    &sealed[CHECKSUM..]
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
