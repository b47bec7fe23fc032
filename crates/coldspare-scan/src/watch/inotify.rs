//! inotify, through `notify`: a watch for each directory.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use notify::event::{EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::{Shared, WatchError, cookie_dir};
use crate::dirty::Hint;

/// The watches of all directories.
pub(super) struct Inotify(RecommendedWatcher);

/// A directory isn't watched.
pub(super) enum NotWatched {
    Gone,
    /// The kernel's limit was reached, or it can't be read.
    Refused(String),
}

impl Inotify {
    /// Watches nothing yet but where marks are put; a root without such a place has no barrier.
    pub(super) fn start(shared: Arc<Shared>) -> Result<Inotify, WatchError> {
        let roots: Vec<_> = shared.roots.iter().map(|root| cookie_dir(&root.path)).collect();
        let mut watcher = notify::recommended_watcher(move |event| take_event(&shared, event))
            .map_err(|e| WatchError::Unavailable(format!("inotify: {e}; raise fs.inotify.max_user_instances")))?;
        for cookies in roots.into_iter().filter(|cookies| cookies.exists()) {
            watcher.watch(&cookies, RecursiveMode::NonRecursive).map_err(|e| WatchError::Root { path: cookies, detail: e.to_string() })?;
        }
        Ok(Inotify(watcher))
    }

    pub(super) fn watch(&mut self, dir: &Path) -> Result<(), NotWatched> {
        self.0.watch(dir, RecursiveMode::NonRecursive).map_err(|e| match &e.kind {
            notify::ErrorKind::PathNotFound => NotWatched::Gone,
            // It went, or one above it became a file: what went is hinted where it was.
            notify::ErrorKind::Io(io) if matches!(io.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => NotWatched::Gone,
            _ => NotWatched::Refused(e.to_string()),
        })
    }

    /// Returns once what is queued was taken: the watching thread answers a request only after that.
    pub(super) fn catch_up(&mut self, root: &Path) {
        let _ = self.0.watch(&cookie_dir(root), RecursiveMode::NonRecursive);
    }
}

fn take_event(shared: &Shared, event: notify::Result<notify::Event>) {
    let event = match event {
        Ok(event) if event.need_rescan() => return shared.lost("the kernel's queue overflowed"),
        Ok(event) => event,
        Err(e) => return shared.lost(&e.to_string()),
    };
    let hint = match event.kind {
        EventKind::Access(_) => return,
        EventKind::Modify(ModifyKind::Name(_)) | EventKind::Create(_) | EventKind::Remove(_) => Hint::Replaced,
        _ => Hint::Changed,
    };
    let mut came = false;
    for path in &event.paths {
        came |= match (path.parent(), path.file_name()) {
            (Some(dir), Some(name)) => shared.take(dir, name.as_encoded_bytes(), hint, None),
            _ => false,
        };
    }
    if came {
        (shared.wake)();
    }
}
