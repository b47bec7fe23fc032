//! The state folder: identity, control record, pins, the invitation, stores, the daemon's lock and socket.
//!
//! Invariants: a file is replaced by writing another, syncing it and renaming it; the control record alternates between
//! two slots, so that a torn write leaves the older one.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use coldspare_core::control::{ControlRecord, SLOT_BYTES};
use coldspare_os::FileLock;
use coldspare_transport::{Identity, PeerKey};

use crate::exit::Failure;

/// Whether a note was there to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removed {
    /// It was.
    WasThere,
    /// It wasn't.
    WasNot,
}

/// The state folder.
#[derive(Debug, Clone)]
pub(crate) struct State {
    dir: PathBuf,
}

impl State {
    /// The folder at `dir`, which may not exist yet.
    pub(crate) fn at(dir: &Path) -> State {
        State { dir: dir.into() }
    }

    /// Makes the folder, for this user only.
    ///
    /// # Errors
    /// `Usage`, naming the path.
    pub(crate) fn create(&self) -> Result<(), Failure> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|e| self.fail(&self.dir, "can't be made", e))
    }

    /// Whether a node lives here.
    pub(crate) fn is_initialised(&self) -> bool {
        self.control_path().exists()
    }

    /// The store of the active.
    pub(crate) fn index_path(&self) -> PathBuf {
        self.dir.join("index.redb")
    }

    /// The store of the standby.
    pub(crate) fn manifest_path(&self) -> PathBuf {
        self.dir.join("manifest.redb")
    }

    /// Makes the store at `path`, if there is none, with what opens it: under another name until it is whole, since a crash
    /// may leave a part of it that can't be opened.
    ///
    /// # Errors
    /// `Usage`, naming the path; what `open` says.
    pub(crate) fn make_store<T, E: std::fmt::Display>(&self, path: &Path, open: impl Fn(&Path) -> Result<T, E>) -> Result<(), Failure> {
        if path.exists() {
            return Ok(());
        }
        let temporary = path.with_extension("redb.new");
        match std::fs::remove_file(&temporary) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(self.fail(&temporary, "can't be removed", e)),
            _ => {}
        }
        drop(open(&temporary).map_err(Failure::usage)?);
        std::fs::rename(&temporary, path).map_err(|e| self.fail(path, "can't be made", e))?;
        self.sync()
    }

    /// Where [`State::replace`] keeps the note `name`.
    pub(crate) fn note_path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the daemon listens for `status`, `checkpoint` and `verify`.
    pub(crate) fn socket_path(&self) -> PathBuf {
        self.dir.join("daemon.sock")
    }

    /// Where the guard listens for `guard --status`.
    pub(crate) fn guard_socket_path(&self) -> PathBuf {
        self.dir.join("guard.sock")
    }

    /// Takes the right to be the one daemon; held until dropped.
    ///
    /// # Errors
    /// `Usage` when another has it.
    pub(crate) fn lock(&self) -> Result<FileLock, Failure> {
        self.lock_as("daemon.lock", "coldspare daemon")
    }

    /// Takes the right to be the one guard; held until dropped.
    ///
    /// # Errors
    /// `Usage` when another has it.
    pub(crate) fn lock_guard(&self) -> Result<FileLock, Failure> {
        self.lock_as("guard.lock", "guard")
    }

    fn lock_as(&self, name: &str, whose: &str) -> Result<FileLock, Failure> {
        let path = self.dir.join(name);
        match FileLock::acquire(&path) {
            Ok(Some(lock)) => Ok(lock),
            Ok(None) => Err(Failure::usage(format!("another {whose} uses {}; stop it first", self.dir.display()))),
            Err(e) => Err(self.fail(&path, "can't be locked", e)),
        }
    }

    /// The identity, which is made when there is none.
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub(crate) fn identity_or_new(&self) -> Result<Identity, Failure> {
        if !self.key_path().exists() {
            Identity::generate().store(&self.key_path()).map_err(Failure::usage)?;
        }
        self.identity()
    }

    /// The identity.
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub(crate) fn identity(&self) -> Result<Identity, Failure> {
        Identity::load(&self.key_path()).map_err(Failure::usage)
    }

    /// The control record.
    ///
    /// # Errors
    /// `Usage` when there is none, `Damage` when neither slot can be read.
    pub(crate) fn control(&self) -> Result<ControlRecord, Failure> {
        let path = self.control_path();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(Failure::usage(format!("{} holds no node; run `coldspare init` first", self.dir.display())));
            }
            Err(e) => return Err(self.fail(&path, "can't be read", e)),
        };
        if bytes.starts_with(b"csctrl\0\x01") || bytes.get(SLOT_BYTES..).is_some_and(|slot| slot.starts_with(b"csctrl\0\x01")) {
            let path = path.display();
            return Err(Failure::usage(format!("the control record {path} has format 1, this coldspare needs 2: set both hosts up anew")));
        }
        newest_slot(&bytes).map(|(_, record)| record).ok_or_else(|| {
            Failure::damage(format!(
                "the control record {} is damaged in both slots; which epoch this node promised is lost: compare with the other host \
                 before you run `coldspare init` anew",
                path.display()
            ))
        })
    }

    /// What is wrong with the control record, when one of its two slots can't be read: the other may be the older one.
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub(crate) fn control_damage(&self) -> Result<Option<String>, Failure> {
        let path = self.control_path();
        let bytes = std::fs::read(&path).map_err(|e| self.fail(&path, "can't be read", e))?;
        let is_bad = |slot: &[u8]| slot.iter().any(|byte| *byte != 0) && ControlRecord::decode_slot(slot).is_none();
        let bad: Vec<String> = bytes.chunks(SLOT_BYTES).enumerate().filter(|(_, slot)| is_bad(slot)).map(|(n, _)| n.to_string()).collect();
        if bad.is_empty() {
            return Ok(None);
        }
        Ok(Some(format!(
            "slot {} of the control record is damaged, and the other one may be older: which epoch this node promised is not certain. \
             With the active connected, `coldspare verify --repair` writes it anew; without it, compare the epoch in `coldspare \
             status` with the other host's before you promote",
            bad.join(" and ")
        )))
    }

    /// Stores the control record, durably.
    ///
    /// # Errors
    /// `Damage`: the record before is still there.
    pub(crate) fn set_control(&self, record: &ControlRecord) -> Result<(), Failure> {
        let path = self.control_path();
        let write = || -> std::io::Result<()> {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            let mut bytes = vec![0; 2 * SLOT_BYTES];
            let _ = file.read_at(&mut bytes, 0)?;
            let next = newest_slot(&bytes).map_or(1, |(seq, _)| seq + 1);
            file.write_all_at(&record.encode_slot(next), (next % 2) * SLOT_BYTES as u64)?;
            file.sync_all()?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|e| Failure::damage(format!("the control record {} can't be written: {e}", path.display())))
    }

    /// The keys of the other host; none before the pairing.
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub(crate) fn pins(&self) -> Result<Vec<PeerKey>, Failure> {
        let path = self.dir.join("pins");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(self.fail(&path, "can't be read", e)),
        };
        let keys = text.lines().filter(|line| !line.trim().is_empty()).map(|line| line.trim().parse::<PeerKey>());
        keys.collect::<Result<_, _>>().map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
    }

    /// Pins the other host's key, replacing what was pinned.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn set_pin(&self, key: PeerKey) -> Result<(), Failure> {
        self.replace("pins", format!("{key}\n").as_bytes())
    }

    /// The invitation that is open (standby), or was given and not used yet (active).
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub(crate) fn invitation(&self) -> Result<Option<String>, Failure> {
        let path = self.dir.join("invitation");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_string())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.fail(&path, "can't be read", e)),
        }
    }

    /// Stores an invitation.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn set_invitation(&self, text: &str) -> Result<(), Failure> {
        self.replace("invitation", text.as_bytes())
    }

    /// Forgets the invitation: it was used.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn remove_invitation(&self) -> Result<(), Failure> {
        let path = self.dir.join("invitation");
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(self.fail(&path, "can't be removed", e)),
            _ => self.sync(),
        }
    }

    /// Writes the small file `name`, replacing it atomically and durably.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn replace(&self, name: &str, content: &[u8]) -> Result<(), Failure> {
        let (path, temporary) = (self.dir.join(name), self.dir.join(format!("{name}.new")));
        let write = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)
        };
        write().map_err(|e| Failure::damage(format!("{} can't be written: {e}", path.display())))?;
        self.sync()
    }

    /// Removes the note `name`, durably.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn remove_note(&self, name: &str) -> Result<Removed, Failure> {
        let path = self.dir.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => self.sync().map(|()| Removed::WasThere),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Removed::WasNot),
            Err(e) => Err(Failure::damage(format!("{} can't be removed: {e}", path.display()))),
        }
    }

    fn sync(&self) -> Result<(), Failure> {
        let synced = File::open(&self.dir).and_then(|d| d.sync_all());
        synced.map_err(|e| Failure::damage(format!("{} can't be synced: {e}", self.dir.display())))
    }

    fn key_path(&self) -> PathBuf {
        self.dir.join("key")
    }

    /// Removes the store at `path`, durably.
    ///
    /// # Errors
    /// `Damage`, naming the file.
    pub(crate) fn remove_store(&self, path: &Path) -> Result<(), Failure> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Failure::damage(format!("{} can't be removed: {e}", path.display()))),
            _ => self.sync(),
        }
    }

    /// The small file `name`, as text; `None` when there is none.
    pub(crate) fn note(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.note_path(name)).ok().map(|text| text.trim().to_string())
    }

    /// Where the control record is.
    pub(crate) fn control_path(&self) -> PathBuf {
        self.dir.join("control")
    }

    fn fail(&self, path: &Path, what: &str, e: std::io::Error) -> Failure {
        Failure::usage(format!("{} {what}: {e}", path.display()))
    }
}

fn newest_slot(bytes: &[u8]) -> Option<(u64, ControlRecord)> {
    bytes.chunks(SLOT_BYTES).filter_map(ControlRecord::decode_slot).max_by_key(|(seq, _)| *seq)
}

#[cfg(test)]
mod tests {
    use coldspare_core::{ClusterId, Epoch, NodeId};

    use super::*;

    #[test]
    fn a_torn_control_record_leaves_the_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::at(dir.path());
        let mut record = ControlRecord::standby(ClusterId([1; 16]), NodeId([2; 16]));
        for epoch in 1..=3 {
            record.promised = Epoch(epoch);
            state.set_control(&record).unwrap();
            assert_eq!(state.control().unwrap().promised, Epoch(epoch));
        }
        // The third write went to slot 1: tear it.
        let file = OpenOptions::new().write(true).open(state.control_path()).unwrap();
        file.write_all_at(&[0xff; 100], SLOT_BYTES as u64 + 30).unwrap();
        assert_eq!(state.control().unwrap().promised, Epoch(2));
        file.write_all_at(&[0xff; 100], 30).unwrap();
        assert_eq!(state.control().unwrap_err().code, crate::exit::Code::Damage);
    }
}
