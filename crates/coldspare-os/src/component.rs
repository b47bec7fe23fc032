//! Checks the names and paths given to a [`Disk`](crate::Disk).
//!
//! Decides which bytes may reach the kernel as a name. It knows nothing of what is on the disk. This is the last
//! line: paths from a peer were checked when they were decoded, and a model of a disk calls these functions too.

use std::io;

/// Checks `name` as one component: not empty, not `.` or `..`, without `/` and NUL.
///
/// The length is left to the filesystem, which answers `ENAMETOOLONG`.
///
/// # Errors
/// `InvalidInput`: the name could mean another directory, or is none at all.
pub fn check_name(name: &[u8]) -> io::Result<&[u8]> {
    let fault = match name {
        b"" => "an empty name",
        b"." | b".." => "a name of only dots",
        _ if name.iter().any(|&b| b == b'/' || b == 0) => "a name with '/' or NUL",
        _ => return Ok(name),
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, fault))
}

/// Checks `path` as components joined by `/`; empty is the directory itself.
///
/// # Errors
/// `InvalidInput`: a component is refused by [`check_name`]; a leading, trailing or doubled `/` is an empty one.
pub fn check_path(path: &[u8]) -> io::Result<&[u8]> {
    if !path.is_empty() {
        for component in path.split(|&b| b == b'/') {
            check_name(component)?;
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: Option<io::ErrorKind> = Some(io::ErrorKind::InvalidInput);

    fn check(bytes: &[u8], as_name: Option<io::ErrorKind>, as_path: Option<io::ErrorKind>) {
        let shown = bytes.escape_ascii();
        assert_eq!(check_name(bytes).err().map(|e| e.kind()), as_name, "{shown} as a name");
        assert_eq!(check_path(bytes).err().map(|e| e.kind()), as_path, "{shown} as a path");
    }

    #[test]
    fn names_that_mean_another_directory_are_refused() {
        check(b"a", None, None);
        check(b"...", None, None);
        check(b"a\n\xff", None, None);
        check(&[b'x'; 255], None, None);
        check(b"", REFUSED, None);
        check(b".", REFUSED, REFUSED);
        check(b"..", REFUSED, REFUSED);
        check(b"a\0b", REFUSED, REFUSED);
        check(b"a/b", REFUSED, None);
        check(b"/a", REFUSED, REFUSED);
        check(b"/", REFUSED, REFUSED);
        check(b"a/", REFUSED, REFUSED);
        check(b"a//b", REFUSED, REFUSED);
        check(b"a/../b", REFUSED, REFUSED);
        check(b"a/./b", REFUSED, REFUSED);
    }
}
