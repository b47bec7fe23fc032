//! A process that can be killed at any call, and a store's file that knows what of it is durable.
//!
//! Both the disk's calls and the store's writes of one process burn one fuse: from the call after which it was killed,
//! none of them does anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Chance;

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// Killed: what it wrote stays.
    Killed,
    /// The host lost its power: what was not synced may be lost.
    PowerLost,
}

/// Counts what one process does to its disk and its store.
#[derive(Debug, Clone, Default)]
pub(super) struct Fuse(Arc<Mutex<Burning>>);

#[derive(Debug, Default)]
struct Burning {
    steps: u64,
    /// After how many steps the process dies.
    at: Option<u64>,
    is_dead: bool,
}

impl Fuse {
    /// Lets the process do `steps` more steps.
    pub(super) fn arm(&self, steps: u64) {
        let mut burning = lock(&self.0);
        burning.at = Some(burning.steps + steps);
    }

    /// The process starts anew.
    pub(super) fn renew(&self) {
        *lock(&self.0) = Burning::default();
    }

    /// Ends the process now.
    pub(super) fn burn(&self) {
        lock(&self.0).is_dead = true;
    }

    /// Counts a step; whether it is the last one.
    pub(super) fn step(&self) -> bool {
        let mut burning = lock(&self.0);
        burning.steps += 1;
        let is_last = !burning.is_dead && burning.at.is_some_and(|at| burning.steps > at);
        burning.is_dead |= is_last;
        is_last
    }

    /// Whether the process is dead.
    pub(super) fn is_dead(&self) -> bool {
        lock(&self.0).is_dead
    }
}

/// The file of a store; what opened it before a death writes no more.
#[derive(Debug, Clone, Default)]
pub(super) struct StoreFile(Arc<Mutex<Bytes>>);

#[derive(Debug, Default)]
struct Bytes {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Write>,
    opened: u64,
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

impl Write {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Write::Length(len) => to.resize(*len as usize, 0),
            Write::Bytes(offset, bytes) => {
                let (start, end) = (*offset as usize, *offset as usize + bytes.len());
                if to.len() < end {
                    to.resize(end, 0);
                }
                to[start..end].copy_from_slice(bytes);
            }
        }
    }
}

impl StoreFile {
    /// Opens it for a process.
    pub(super) fn open(&self, fuse: &Fuse) -> OpenStore {
        let mut bytes = lock(&self.0);
        bytes.opened += 1;
        OpenStore { file: self.clone(), fuse: fuse.clone(), opened: bytes.opened }
    }

    /// What a death would leave of it now, by the two kinds of death.
    pub(super) fn copy(&self) -> StoreCopy {
        let bytes = lock(&self.0);
        StoreCopy { now: bytes.now.clone(), durable: bytes.durable.clone() }
    }

    /// Leaves what a death at the time of `copy` leaves, and lets the process write no more.
    pub(super) fn die_at(&self, death: Death, copy: StoreCopy) {
        let mut bytes = lock(&self.0);
        bytes.opened += 1;
        bytes.unsynced.clear();
        bytes.now = if death == Death::Killed { copy.now } else { copy.durable };
        bytes.durable = bytes.now.clone();
    }

    /// Leaves what the death of the process leaves, and lets it write no more; each write that was not synced is lost or
    /// not, by itself.
    pub(super) fn die(&self, death: Death, chance: &mut Chance) {
        let mut bytes = lock(&self.0);
        bytes.opened += 1;
        let unsynced = std::mem::take(&mut bytes.unsynced);
        if death == Death::PowerLost {
            let mut left = std::mem::take(&mut bytes.durable);
            unsynced.iter().filter(|_| chance.happens(1, 2)).for_each(|write| write.apply(&mut left));
            bytes.now = left;
        }
        bytes.durable = bytes.now.clone();
    }
}

/// A store's file at one instant.
#[derive(Debug, Clone)]
pub(super) struct StoreCopy {
    now: Vec<u8>,
    durable: Vec<u8>,
}

/// A store's file as one process has it open.
#[derive(Debug)]
pub(super) struct OpenStore {
    file: StoreFile,
    fuse: Fuse,
    opened: u64,
}

impl OpenStore {
    fn bytes(&self) -> std::io::Result<MutexGuard<'_, Bytes>> {
        let bytes = lock(&self.file.0);
        if bytes.opened == self.opened { Ok(bytes) } else { Err(gone()) }
    }

    fn changing(&self) -> std::io::Result<MutexGuard<'_, Bytes>> {
        if self.fuse.is_dead() {
            return Err(gone());
        }
        self.fuse.step();
        self.bytes()
    }

    fn write(&self, write: Write) -> std::io::Result<()> {
        let mut bytes = self.changing()?;
        write.apply(&mut bytes.now);
        bytes.unsynced.push(write);
        Ok(())
    }
}

impl redb::StorageBackend for OpenStore {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.bytes()?.now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        let bytes = self.bytes()?;
        let from = offset as usize;
        let there = bytes.now.get(from..from + out.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(there);
        Ok(())
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.write(Write::Length(len))
    }

    fn sync_data(&self) -> std::io::Result<()> {
        let mut bytes = self.changing()?;
        let unsynced = std::mem::take(&mut bytes.unsynced);
        for write in unsynced {
            write.apply(&mut bytes.durable);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        OpenStore::write(self, Write::Bytes(offset, data.to_vec()))
    }
}

fn gone() -> std::io::Error {
    std::io::Error::other("the process is dead")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
