//! A store's file in memory: what is durable, what is in flight, and what a crash leaves of it.
//!
//! What it assumes of the medium: `sync_data` makes all writes before it durable; of later ones any may be durable, in any
//! order, and one that the power cuts off is whole up to some sector of 512 bytes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Chance;

use super::content::Content;
use super::disk::lock;

/// A file that redb takes for its database; clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct ModelStore(Arc<Mutex<State>>);

/// A store's bytes at one instant; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct StoreImage(Content);

#[derive(Default)]
struct State {
    live: Content,
    durable: Content,
    in_flight: Vec<InFlight>,
    skips_syncs: bool,
    on_sync: Option<SyncHook>,
}

type SyncHook = Arc<dyn Fn(&ModelStore) + Send + Sync>;

#[derive(Debug, Clone)]
enum InFlight {
    Write { offset: u64, bytes: Arc<[u8]> },
    SetLen { len: u64 },
}

const SECTOR_BYTES: usize = 512;

impl StoreImage {
    /// Of its bytes; equal images have equal hashes.
    pub fn hash(&self) -> u64 {
        self.0.hash()
    }
}

impl ModelStore {
    /// Makes a store from what a crash left.
    pub fn of(image: StoreImage) -> ModelStore {
        let state = State { live: image.0.clone(), durable: image.0, ..State::default() };
        ModelStore(Arc::new(Mutex::new(state)))
    }

    /// What is durable.
    pub fn durable(&self) -> StoreImage {
        StoreImage(self.state().durable.clone())
    }

    /// What is written, durable or not.
    pub fn written(&self) -> StoreImage {
        StoreImage(self.state().live.clone())
    }

    /// What is durable, with some of what is in flight, and sometimes a part of one.
    pub fn crashed(&self, chance: &mut Chance) -> StoreImage {
        let state = self.state();
        let mut image = state.durable.clone();
        let of = 1 + chance.below(8);
        for write in &state.in_flight {
            match write {
                _ if chance.happens(1, of) => {}
                InFlight::SetLen { len } => image.set_len(*len),
                InFlight::Write { offset, bytes } => {
                    let sectors = bytes.len().div_ceil(SECTOR_BYTES) as u64;
                    let whole = if chance.happens(1, 4) { chance.below(sectors + 1) as usize * SECTOR_BYTES } else { bytes.len() };
                    image.write(*offset, &bytes[..whole.min(bytes.len())]);
                }
            }
        }
        // redb sets the length before it writes beyond the old one; a file never ends before what is durable.
        image.set_len(image.len().max(state.durable.len()));
        StoreImage(image)
    }

    /// How many writes are in flight.
    pub fn in_flight(&self) -> usize {
        self.state().in_flight.len()
    }

    /// Lets `hook` run before and after each sync.
    pub fn on_sync(&self, hook: impl Fn(&ModelStore) + Send + Sync + 'static) {
        self.state().on_sync = Some(Arc::new(hook));
    }

    /// Takes the hook away.
    pub fn leave_alone(&self) {
        self.state().on_sync = None;
    }

    /// Lets syncs do nothing and succeed.
    pub fn skip_syncs(&self) {
        self.state().skips_syncs = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl redb::StorageBackend for ModelStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().live.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self.state().live.read(offset, out) {
            count if count == out.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.live.set_len(len);
        state.in_flight.push(InFlight::SetLen { len });
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let hook = self.state().on_sync.clone();
        if let Some(hook) = &hook {
            hook(self);
        }
        {
            let mut state = self.state();
            if !state.skips_syncs {
                state.durable = state.live.clone();
                state.in_flight.clear();
            }
        }
        if let Some(hook) = &hook {
            hook(self);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        state.live.write(offset, data);
        state.in_flight.push(InFlight::Write { offset, bytes: data.into() });
        Ok(())
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, {} writes in flight", self.live.len(), self.in_flight.len())
    }
}
