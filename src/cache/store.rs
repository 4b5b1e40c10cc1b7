//! The file under a cache: a redb database, whose errors are named and whose panics are caught.

use std::io::ErrorKind;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use redb::{
    Builder, Database, DatabaseError, ReadOnlyDatabase, ReadTransaction, ReadableDatabase,
    TableDefinition, WriteTransaction,
};

use super::IDENTITY;
use crate::error::{Error, Result, Status, bail};

/// One type of key for all tables: redb's code is compiled for each.
type Records = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// "identity" → the JSON of an Identity.
pub const META: Records = TableDefinition::new("meta");
/// Example → its number of tokens, u64, and its groups.
pub const EXAMPLES: Records = TableDefinition::new("examples");
/// Latent → its id in the dictionary, u64.
pub const COLUMNS: Records = TableDefinition::new("columns");
/// Group → its latents, in the order of their columns.
pub const GROUPS: Records = TableDefinition::new("groups");
/// Example and group → z of its tokens, f32, one column after the other.
pub const VALUES: Records = TableDefinition::new("values");

/// Pages that one open file keeps in memory; the system's page cache has the rest.
const PAGE_CACHE: usize = 64 << 20;

/// An open file.
pub struct Store {
    path: PathBuf,
    file: ManuallyDrop<File>,
    /// Locks and pending pages belong to the process that opened it.
    process: u32,
    /// A call panicked: what redb holds in memory is no longer trusted.
    broken: AtomicBool,
}

enum File {
    Shared(ReadOnlyDatabase),
    Sole(Database),
}

impl Store {
    /// write: for this process alone.
    pub fn open(path: &Path, write: bool) -> Result<Store> {
        let file = caught(|| if write { open_sole(path) } else { open_shared(path) })
            .unwrap_or_else(|| Err(damaged()))
            .map_err(|e| named(path, e))?;
        Ok(Store::of(path, file))
    }

    fn of(path: &Path, file: File) -> Store {
        Store {
            path: path.to_owned(),
            file: ManuallyDrop::new(file),
            process: std::process::id(),
            broken: AtomicBool::new(false),
        }
    }

    /// On a disk of the tests.
    #[cfg(test)]
    pub fn on(path: &Path, disk: impl redb::StorageBackend) -> Store {
        Store::of(path, File::Sole(builder().create_with_backend(disk).unwrap()))
    }

    pub fn read<T>(&self, body: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.guarded(|| match &*self.file {
            File::Shared(database) => body(&database.begin_read()?),
            File::Sole(database) => body(&database.begin_read()?),
        })
    }

    /// All of it or nothing; on the disk when this returns.
    pub fn write<T>(&self, body: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.guarded(|| {
            let File::Sole(database) = &*self.file else {
                bail!(InvalidArgument, "opened for reading; open it in a mode that writes");
            };
            let mut transaction = database.begin_write()?;
            // Readers open it as it stands after a crash, and writers without a pass over the file.
            transaction.set_quick_repair(true);
            let value = body(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })
    }

    /// Puts the file's name before a message.
    pub fn name(&self, error: Error) -> Error {
        named(&self.path, error)
    }

    fn guarded<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.process != std::process::id() {
            return Err(self.name(Error::new(
                Status::Forked,
                "opened before a fork; open it again in this process",
            )));
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(self.name(damaged()));
        }
        let outcome = caught(body).unwrap_or_else(|| {
            self.broken.store(true, Ordering::Release);
            Err(damaged())
        });
        outcome.map_err(|e| self.name(e))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // In a child of fork, closing would write to the parent's file and release its lock.
        if self.process == std::process::id() {
            // SAFETY: dropped once, here.
            let file = unsafe { ManuallyDrop::take(&mut self.file) };
            // Every commit is on the disk already: closing only marks the file clean.
            let _ = caught(|| drop(file));
        }
    }
}

/// Whether there is a file to open.
pub fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|e| Error::io(path, "open the cache", &e))
}

/// Makes a cache without examples. It takes its name when it is complete, so that whoever finds the
/// name finds a cache; one that another process made meanwhile stays.
pub fn create(path: &Path, identity: &[u8]) -> Result<()> {
    let fail = |e: std::io::Error| Error::io(path, "make the cache", &e.kind().into());
    let new = crate::output::temporary_beside(path).map_err(fail)?;
    let fill = || -> Result<()> {
        let database = builder().create(new.path())?;
        let transaction = database.begin_write()?;
        transaction.open_table(META)?.insert(IDENTITY, identity)?;
        transaction.open_table(EXAMPLES)?;
        transaction.open_table(COLUMNS)?;
        transaction.open_table(GROUPS)?;
        transaction.open_table(VALUES)?;
        transaction.commit()?;
        database.close()?;
        Ok(())
    };
    fill().map_err(|e| named(path, e))?;
    match new.persist_noclobber(path) {
        Err(e) if e.error.kind() != ErrorKind::AlreadyExists => Err(fail(e.error)),
        _ => Ok(()),
    }
}

fn open_sole(path: &Path) -> Result<File> {
    Ok(File::Sole(builder().open(path)?))
}

fn open_shared(path: &Path) -> Result<File> {
    match builder().open_read_only(path) {
        // A writer was killed where redb needs to repair the file, which takes a writer.
        Err(DatabaseError::RepairAborted) => {
            drop(builder().open(path).map_err(|e| {
                let e = Error::from(e);
                Error::new(
                    e.status,
                    format!("its last writer was interrupted, and the repair failed: {e}"),
                )
            })?);
            Ok(File::Shared(builder().open_read_only(path)?))
        }
        opened => Ok(File::Shared(opened?)),
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(PAGE_CACHE);
    builder
}

/// None when it panicked, which redb does on some damaged files.
fn caught<T>(body: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(body)).ok()
}

fn damaged() -> Error {
    Error::new(
        Status::Format,
        "damaged: its tables cannot be followed; remove the file and fill it again",
    )
}

fn named(path: &Path, error: Error) -> Error {
    Error::new(error.status, format!("{}: {}", path.display(), error.message))
}

macro_rules! errors_of_redb {
    ($($error:ty),*) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Error {
                from_redb(error.into())
            }
        })*
    };
}
errors_of_redb!(
    redb::CommitError,
    redb::DatabaseError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError
);

fn from_redb(error: redb::Error) -> Error {
    use redb::Error as E;
    let (status, message) = match error {
        E::DatabaseAlreadyOpen => (
            Status::CacheBusy,
            "in use: one process may write, or several read; try again when it is closed".into(),
        ),
        E::Io(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            (Status::Format, format!("not a reference cache, or damaged: {e}"))
        }
        E::Io(e) => (Status::Io, format!("the cache cannot be read or written: {e}")),
        E::PreviousIo => {
            (Status::Io, "an earlier call met an error of the disk; open it again".into())
        }
        E::UpgradeRequired(_) | E::Corrupted(_) => {
            (Status::Format, format!("not a reference cache, or damaged: {error}"))
        }
        E::TableDoesNotExist(_) | E::TableTypeMismatch { .. } | E::TypeDefinitionChanged { .. } => {
            (Status::Format, format!("not a reference cache: {error}"))
        }
        other => (Status::Format, format!("the store failed: {other}")),
    };
    Error::new(status, message)
}
