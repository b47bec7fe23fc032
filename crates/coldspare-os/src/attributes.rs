//! Reads extended attributes, and gives a held entry its metadata.
//!
//! Decides the order of the calls. It doesn't know where the entry stands or who wants it so.
//!
//! Invariants:
//! - *Never wider*: at no instant does the entry grant anybody more than its old or its new metadata does. Owners are
//!   left out: what their bits deny, they may grant themselves.
//! - *Exact*: after success the `user.*` and ACL attributes are those wanted and no others.
//! - *Idempotent*: applying twice equals applying once, after a crash anywhere in between too.

use std::io;

use rustix::io::Errno;

use crate::disk::{ACCESS_ACL, Attributes, DEFAULT_ACL, Stat};
use crate::handle::{Handle, is};

/// Reads all extended attributes that may be read, sorted by name.
pub(crate) fn read_xattrs(handle: &Handle<'_>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut xattrs = Vec::new();
    for name in handle.xattr_names()? {
        match handle.xattr(&name) {
            Ok(Some(value)) => xattrs.push((name, value)),
            Ok(None) => {}
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && !Attributes::covers(&name) => {}
            Err(e) => return Err(e),
        }
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}

/// Gives an entry, whose state is `found`, the attributes `wanted`; says what it has then.
///
/// The order, and why:
/// 1. Group and other rights that aren't wanted go first when the owner or the ACL changes: the new group must not
///    have the old group's rights, nor somebody named in the old ACL a new mask.
/// 2. `user.*` attributes, while we still own the entry.
/// 3. Owner, which clears set-id bits of files.
/// 4. ACLs. The group bits of a mode are the mask of its ACL: setting one sets the other, removing an ACL leaves the
///    mask as rights of the group. Step 1 made it narrow enough.
/// 5. Mode, which is right already if it came with the ACL.
/// 6. Times, which nothing above changes.
pub(crate) fn apply(handle: &Handle<'_>, found: &Stat, wanted: &Attributes<'_>) -> io::Result<Stat> {
    wanted.check()?;
    let names = handle.xattr_names()?;
    let user = XattrChanges::between(handle, &names, wanted.xattrs, |name| name.starts_with(b"user."))?;
    let acls = XattrChanges::between(handle, &names, wanted.xattrs, |name| name == ACCESS_ACL || name == DEFAULT_ACL)?;
    let owner_differs = (found.uid, found.gid) != (wanted.uid, wanted.gid);

    // The mode as the kernel has it; `None` when a call may have changed it.
    let mut mode = Some(found.mode);
    let narrowed = found.mode & (wanted.mode | 0o7700);
    if narrowed != found.mode && (owner_differs || acls.touch(ACCESS_ACL)) {
        handle.set_mode(narrowed)?;
        mode = Some(narrowed);
    }
    match user.make(handle) {
        // The kernel asks a file's mode even of its owner and even on a descriptor; git's files are mode 0444.
        Err(e) if is(&e, Errno::ACCESS) => {
            let opened = narrowed | 0o600;
            handle.set_mode(opened)?;
            mode = Some(opened);
            user.make(handle)?;
        }
        result => result?,
    }
    if owner_differs {
        let differing = |found: u32, wanted: u32| (found != wanted).then_some(wanted);
        handle.set_owner(differing(found.uid, wanted.uid), differing(found.gid, wanted.gid))?;
        mode = mode.filter(|mode| mode & 0o6000 == 0);
    }
    acls.make(handle)?;
    if acls.touch(ACCESS_ACL) {
        mode = None;
    }
    if mode != Some(wanted.mode) {
        handle.set_mode(wanted.mode)?;
    }
    if found.mtime != wanted.mtime {
        handle.set_mtime(wanted.mtime)?;
    }
    handle.stat()
}

/// What differs among the extended attributes of one namespace.
struct XattrChanges<'a> {
    remove: Vec<&'a [u8]>,
    set: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> XattrChanges<'a> {
    /// Compares the attributes `names` of an entry with those wanted, as far as `is_member` takes their names.
    fn between(
        handle: &Handle<'_>,
        names: &'a [Vec<u8>],
        wanted: &[(&'a [u8], &'a [u8])],
        is_member: fn(&[u8]) -> bool,
    ) -> io::Result<XattrChanges<'a>> {
        let is_wanted = |name: &[u8]| wanted.iter().any(|(w, _)| *w == name);
        let remove = names.iter().map(Vec::as_slice).filter(|name| is_member(name) && !is_wanted(name)).collect();
        let mut set = Vec::new();
        for &(name, value) in wanted.iter().filter(|(name, _)| is_member(name)) {
            let holds = names.iter().any(|n| n == name) && has_value(handle, name, value)?;
            if !holds {
                set.push((name, value));
            }
        }
        Ok(XattrChanges { remove, set })
    }

    fn touch(&self, name: &[u8]) -> bool {
        self.remove.contains(&name) || self.set.iter().any(|(n, _)| *n == name)
    }

    /// Removes, which makes room, then sets.
    fn make(&self, handle: &Handle<'_>) -> io::Result<()> {
        for name in &self.remove {
            handle.remove_xattr(name)?;
        }
        for (name, value) in &self.set {
            handle.set_xattr(name, value)?;
        }
        Ok(())
    }
}

fn has_value(handle: &Handle<'_>, name: &[u8], value: &[u8]) -> io::Result<bool> {
    match handle.xattr(name) {
        Ok(found) => Ok(found.as_deref() == Some(value)),
        // Not readable to its owner: set it, whatever it is.
        Err(e) if is(&e, Errno::ACCESS) => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::XattrFlags;

    use super::*;
    use crate::scratch::{Scratch, as_nobody, assert_errno, assert_refused, ours};
    use crate::{Disk, RealDisk};

    const USER_OBJ: u16 = 0x01;
    const USER: u16 = 0x02;
    const GROUP_OBJ: u16 = 0x04;
    const GROUP: u16 = 0x08;
    const MASK: u16 = 0x10;
    const OTHER: u16 = 0x20;
    const NO_ID: u32 = u32::MAX;

    /// An ACL as the kernel gives it: version 2, then tag, rights and id of each entry, little-endian (`acl(5)`,
    /// `linux/posix_acl_xattr.h`).
    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, rights, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(rights.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    /// Mode 0660 by its mask, while the owning group has nothing; user 1234 and group 77 may read and write.
    fn private_acl() -> Vec<u8> {
        acl(&[(USER_OBJ, 6, NO_ID), (USER, 6, 1234), (GROUP_OBJ, 0, NO_ID), (GROUP, 6, 77), (MASK, 6, NO_ID), (OTHER, 0, NO_ID)])
    }

    fn borrow(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<(&[u8], &[u8])> {
        xattrs.iter().map(|(name, value)| (&**name, &**value)).collect()
    }

    fn with<'a>(mode: u16, xattrs: &'a [(&'a [u8], &'a [u8])]) -> Attributes<'a> {
        Attributes { xattrs, ..ours(mode) }
    }

    /// Gives a file `before`, then `after`, each by descriptor and by name, and checks that it has exactly that.
    fn check(before: &Attributes<'_>, after: &Attributes<'_>) {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let file = disk.create_file(root, b"file").unwrap();
        scratch.file("named", b"");
        let dir = scratch.dir("dir");
        drop(scratch.dir("nameddir"));
        for (step, wanted) in [before, after, after].into_iter().enumerate() {
            let stats = [
                (&b"file"[..], disk.set_attributes_of_file(&file, wanted).unwrap()),
                (b"named", disk.set_attributes(root, b"named", wanted).unwrap()),
                (b"dir", disk.set_attributes_of_dir(&dir, wanted).unwrap()),
                (b"nameddir", disk.set_attributes(root, b"nameddir", wanted).unwrap()),
            ];
            for (name, stat) in stats {
                let got = (stat.mode, stat.uid, stat.gid, stat.mtime);
                assert_eq!(got, (wanted.mode, wanted.uid, wanted.gid, wanted.mtime), "{} in step {step}", name.escape_ascii());
                assert_eq!(stat, disk.stat(root, name).unwrap());
                let mut expected = wanted.xattrs.to_vec();
                expected.sort();
                assert_eq!(borrow(&disk.xattrs(root, name).unwrap()), expected, "{} in step {step}", name.escape_ascii());
            }
            assert_eq!(disk.xattrs_of_file(&file).unwrap(), disk.xattrs(root, b"file").unwrap());
            assert_eq!(disk.xattrs(&dir, b"").unwrap(), disk.xattrs(root, b"dir").unwrap());
        }
    }

    #[test]
    fn attributes_become_exactly_what_is_wanted() {
        let private = private_acl();
        let other = acl(&[(USER_OBJ, 7, NO_ID), (USER, 4, 9), (GROUP_OBJ, 5, NO_ID), (MASK, 5, NO_ID), (OTHER, 5, NO_ID)]);
        let large = vec![b'v'; 2000];
        let many: Vec<(Vec<u8>, Vec<u8>)> = (0..30).map(|n| (format!("user.{n:030}").into_bytes(), vec![n])).collect();
        let many = borrow(&many);
        let plain = ours(0o644);
        let private = [(ACCESS_ACL, &*private)];
        let with_acl = with(0o660, &private);
        check(&plain, &ours(0o444));
        check(&plain, &with_acl);
        check(&with_acl, &plain);
        check(&with_acl, &with(0o755, &[(ACCESS_ACL, &*other)]));
        check(&with_acl, &ours(0o600));
        check(&with(0o600, &[(b"user.b", b"1"), (b"user.a", b"")]), &with(0o600, &[(b"user.a", b"2"), (b"user.c", b"\0\xff")]));
        check(&with(0o600, &many), &with(0o600, &[(b"user.large", &large)]));
        if rustix::process::geteuid().is_root() {
            check(&plain, &Attributes { uid: 1001, gid: 1002, ..plain });
            check(&with_acl, &Attributes { uid: 1001, gid: 1002, ..ours(0o2755) });
            check(&Attributes { uid: 1001, ..ours(0o6755) }, &Attributes { uid: 7, ..ours(0o6755) });
            check(&Attributes { gid: 1001, ..ours(0o666) }, &Attributes { gid: 7, ..with_acl });
        }
    }

    #[test]
    fn times_are_kept_to_the_nanosecond() {
        let plain = ours(0o600);
        for mtime in [(0, 0), (1, 1), (-1, 999_999_999), (-86_400, 500_000_000), (-2_147_483_648, 0), (4_294_967_296, 7)] {
            check(&plain, &Attributes { mtime, ..plain });
        }
    }

    #[test]
    fn inherited_acls_are_removed_and_default_acls_kept() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let dir = scratch.dir("dir");
        let default = private_acl();
        let wanted = Attributes { xattrs: &[(DEFAULT_ACL, &default)], ..ours(0o755) };
        assert_eq!(disk.set_attributes_of_dir(&dir, &wanted).unwrap().mode, 0o755);
        assert_eq!(disk.xattrs(root, b"dir").unwrap(), [(DEFAULT_ACL.to_vec(), default.clone())]);

        let file = disk.create_file(&dir, b"file").unwrap();
        assert_eq!(disk.xattrs_of_file(&file).unwrap().len(), 1, "inherited");
        assert_eq!(disk.set_attributes_of_file(&file, &ours(0o640)).unwrap().mode, 0o640);
        assert_eq!(disk.xattrs_of_file(&file).unwrap(), []);
        disk.create_dir(&dir, b"inner").unwrap();
        assert_eq!(disk.xattrs(&dir, b"inner").unwrap().len(), 2, "inherited");
        disk.set_attributes(&dir, b"inner", &ours(0o755)).unwrap();
        assert_eq!(disk.xattrs(&dir, b"inner").unwrap(), []);
        disk.set_attributes_of_dir(&dir, &ours(0o755)).unwrap();
        assert_eq!(disk.xattrs(root, b"dir").unwrap(), []);
        assert!(disk.set_attributes_of_file(&file, &wanted).is_err(), "files have no default ACL");
    }

    #[test]
    fn other_namespaces_are_read_and_left_alone() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        let file = disk.create_file(root, b"file").unwrap();
        if rustix::fs::setxattr(scratch.path("file"), "trusted.t", b"kept", XattrFlags::empty()).is_err() {
            println!("skipped: needs root");
            return;
        }
        let kept = [(b"trusted.t".to_vec(), b"kept".to_vec())];
        disk.set_attributes_of_file(&file, &ours(0o600)).unwrap();
        disk.set_attributes(root, b"file", &ours(0o644)).unwrap();
        assert_eq!(disk.xattrs_of_file(&file).unwrap(), kept);
        let granting = Attributes { xattrs: &[(b"trusted.t", b"")], ..ours(0o644) };
        assert_refused(disk.set_attributes_of_file(&file, &granting));
        disk.symlink(b"file", root, b"link").unwrap();
        rustix::fs::lsetxattr(scratch.path("link"), "trusted.t", b"kept", XattrFlags::empty()).unwrap();
        assert_eq!(disk.xattrs(root, b"link").unwrap(), []);
    }

    #[test]
    fn nothing_is_set_that_holds_already() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"");
        let private = private_acl();
        let wanted = Attributes { xattrs: &[(ACCESS_ACL, &private), (b"user.a", b"1")], ..ours(0o660) };
        let first = disk.set_attributes(root, b"file", &wanted).unwrap();
        // Any call that sets something would move the change time, whose grain is a clock tick or less.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            scratch.file("probe", b"");
            let moved = disk.stat(root, b"probe").unwrap().ctime > first.ctime;
            disk.remove_file(root, b"probe").unwrap();
            if moved {
                break;
            }
            assert!(std::time::Instant::now() < deadline);
        }
        assert_eq!(disk.set_attributes(root, b"file", &wanted).unwrap(), first);
    }

    #[test]
    fn a_refused_acl_leaves_the_mode_narrow() {
        let scratch = Scratch::new();
        let file = scratch.disk.create_file(&scratch.root, b"file").unwrap();
        // An ACL with a named user but no mask is malformed; mode 0660 would let the owning group write.
        let malformed = acl(&[(USER_OBJ, 6, NO_ID), (USER, 6, 1234), (GROUP_OBJ, 0, NO_ID), (OTHER, 0, NO_ID)]);
        let wanted = Attributes { xattrs: &[(ACCESS_ACL, &malformed)], ..ours(0o660) };
        assert_refused(scratch.disk.set_attributes_of_file(&file, &wanted));
        assert_eq!(scratch.disk.stat_file(&file).unwrap().mode, 0o600);
        // What isn't wanted any more is gone by then, what is wanted in addition hasn't come.
        scratch.disk.set_attributes_of_file(&file, &ours(0o664)).unwrap();
        assert_refused(scratch.disk.set_attributes_of_file(&file, &Attributes { mode: 0o646, ..wanted }));
        assert_eq!(scratch.disk.stat_file(&file).unwrap().mode, 0o644);
    }

    #[test]
    fn the_mode_has_the_last_word_over_an_acl() {
        let scratch = Scratch::new();
        let file = scratch.disk.create_file(&scratch.root, b"file").unwrap();
        let private = private_acl();
        let wanted = Attributes { xattrs: &[(ACCESS_ACL, &private)], ..ours(0o600) };
        assert_eq!(scratch.disk.set_attributes_of_file(&file, &wanted).unwrap().mode, 0o600);
    }

    #[test]
    fn entries_that_their_owner_may_not_open_get_attributes_all_the_same() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        disk.set_attributes_of_dir(root, &ours(0o777)).unwrap();
        let private = private_acl();
        let _ = as_nobody(|| {
            let plain = Attributes { uid: 65534, gid: 65534, ..ours(0o444) };
            let noted = Attributes { xattrs: &[(ACCESS_ACL, &private), (b"user.note", b"1")], ..plain };
            for mode in [0o000, 0o444, 0o200] {
                let file = disk.create_file(root, b"file").unwrap();
                disk.create_dir(root, b"dir").unwrap();
                disk.set_attributes_of_file(&file, &Attributes { mode, xattrs: &[(b"user.old", b"0")], ..plain }).unwrap();
                for name in [&b"file"[..], b"dir"] {
                    disk.set_attributes(root, name, &Attributes { mode, xattrs: &[(b"user.note", b"0")], ..plain }).unwrap();
                    let stat = disk.set_attributes(root, name, &Attributes { mode: 0o660, ..noted }).unwrap();
                    assert_eq!((stat.mode, stat.mtime), (0o660, plain.mtime));
                    assert_eq!(borrow(&disk.xattrs(root, name).unwrap()), noted.xattrs);
                }
                disk.remove_file(root, b"file").unwrap();
                disk.remove_dir(root, b"dir").unwrap();
            }
            let file = disk.create_file(root, b"file").unwrap();
            let mine = disk.set_attributes_of_file(&file, &plain).unwrap();
            assert_errno(disk.set_attributes_of_file(&file, &Attributes { uid: 0, ..plain }), Errno::PERM);
            assert_eq!(disk.stat_file(&file).unwrap(), mine);
        });
    }

    #[test]
    fn symlinks_get_owner_and_time_and_what_they_name_gets_nothing() {
        let scratch = Scratch::new();
        let Scratch { disk, root, .. } = &scratch;
        scratch.file("file", b"");
        disk.symlink(b"file", root, b"link").unwrap();
        disk.symlink(b"nowhere", root, b"dangling").unwrap();
        let untouched = disk.stat(root, b"file").unwrap();
        let id = if rustix::process::geteuid().is_root() { 1234 } else { ours(0).uid };
        for name in [&b"link"[..], b"dangling"] {
            let stat = disk.set_attributes_of_symlink(root, name, id, ours(0).gid, (-5, 6)).unwrap();
            assert_eq!((stat.uid, stat.gid, stat.mtime), (id, ours(0).gid, (-5, 6)));
            assert_eq!(stat, disk.stat(root, name).unwrap());
            let stat = disk.set_attributes(root, name, &ours(0o777)).unwrap();
            assert_eq!((stat.uid, stat.mtime), (ours(0).uid, ours(0).mtime));
            assert_eq!(disk.xattrs(root, name).unwrap(), []);
        }
        assert_eq!(disk.stat(root, b"file").unwrap(), untouched);
        assert_refused(disk.set_attributes_of_symlink(root, b"file", id, id, (0, 0)));
        assert_refused(disk.set_attributes_of_symlink(root, b"link", u32::MAX, id, (0, 0)));
        assert_refused(disk.set_attributes_of_symlink(root, b"link", id, id, (0, 1_000_000_000)));
        assert_errno(disk.set_attributes_of_symlink(root, b"missing", id, id, (0, 0)), Errno::NOENT);
        assert_errno(disk.set_attributes(root, b"missing", &ours(0)), Errno::NOENT);
    }

    #[test]
    fn special_files_get_attributes_without_being_opened() {
        let scratch = Scratch::new();
        scratch.fifo("fifo");
        let stat = scratch.disk.set_attributes(&scratch.root, b"fifo", &ours(0o640)).unwrap();
        assert_eq!((stat.mode, stat.mtime), (0o640, ours(0).mtime));
        assert_eq!(scratch.disk.xattrs(&scratch.root, b"fifo").unwrap(), []);
    }

    #[test]
    fn a_filesystem_without_extended_attributes_has_none_and_refuses_them() {
        let disk = RealDisk::staying();
        let proc = disk.open_root("/proc".as_ref()).unwrap();
        assert_eq!(disk.xattrs(&proc, b"version").unwrap(), []);
        let handle = Handle::pin(std::fs::File::open("/proc").unwrap().as_fd(), b"version", rustix::fs::ResolveFlags::BENEATH).unwrap();
        assert_errno(handle.set_xattr(b"user.a", b"1"), Errno::NOTSUP);
        assert_errno(handle.set_xattr(ACCESS_ACL, &private_acl()), Errno::NOTSUP);
    }
}
