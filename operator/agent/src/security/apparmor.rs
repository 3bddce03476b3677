//! AppArmor's loaded profiles: reading one with the compiled policy that it was loaded from, and loading it again.
//!
//! CRIU's code in a process runs under the process's profile, which a tracer's freedom does not help. For the time of a
//! checkpoint the same policy is loaded under the same name in complain mode: what it does not allow is allowed and
//! logged, what it denies in so many words stays denied. The kernel keeps the bytes of every loaded policy, so that they
//! can be loaded back.

use std::io;

use super::kernelfs::{KernelFs, PolicyFolder};

/// A compiled policy above this size is refused: the largest known are a few MiB.
const LIMIT: usize = 32 << 20;
/// In the version of a compiled policy: every profile in it is loaded in complain mode (security/apparmor/policy_unpack.c).
const FORCE_COMPLAIN: u32 = 0x800;
/// Types of the items of a compiled policy (security/apparmor/include/policy_unpack.h).
const CODE_NAME: u8 = 4;
const CODE_STRING: u8 = 5;
const CODE_U32: u8 = 2;

/// A profile as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// enforce, complain, kill, unconfined.
    pub mode: String,
    /// The compiled policy that it was loaded from.
    pub policy: Vec<u8>,
}

/// A profile could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The kernel refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The bytes are no compiled policy that this version understands.
    #[error("the kernel's copy of the policy is not understood at byte {0}")]
    Malformed(usize),
    /// A change would reach other profiles.
    #[error("it was loaded together with {0:?}, which would be changed with it")]
    NotAlone(String),
    /// Too large.
    #[error("its policy of {0} bytes is larger than {LIMIT}")]
    TooLarge(usize),
}

/// Reads the profile of this name in the first namespace; `None` when it is not loaded.
///
/// # Errors
/// When the kernel has no AppArmor, or refuses.
pub fn read(name: &str) -> Result<Option<Profile>, ProfileError> {
    let folder = PolicyFolder::open()?;
    for entry in folder.profiles()? {
        // The entry's own name is the profile's with what a file's name cannot have replaced.
        let found = folder.read(&format!("profiles/{entry}/name"), LIMIT);
        if found.is_ok_and(|bytes| bytes.strip_suffix(b"\n") == Some(name.as_bytes())) {
            let mode = folder.read(&format!("profiles/{entry}/mode"), LIMIT)?;
            let policy = folder.read(&format!("profiles/{entry}/raw_data"), LIMIT + 1)?;
            if policy.len() > LIMIT {
                return Err(ProfileError::TooLarge(policy.len()));
            }
            let mode = String::from_utf8_lossy(&mode).trim().to_owned();
            return Ok(Some(Profile { mode, policy }));
        }
    }
    Ok(None)
}

/// Loads a compiled policy in the place of what has its names now.
///
/// # Errors
/// When the kernel refuses it; then nothing has changed.
pub fn load(policy: &[u8]) -> Result<(), ProfileError> {
    Ok(KernelFs::Security.write_bytes("apparmor/.replace", policy)?)
}

/// The same policy in complain mode; pure. It must hold no profile but this one and its children.
///
/// # Errors
/// When it is not understood, or holds others.
pub fn complaining(name: &str, policy: &[u8]) -> Result<Vec<u8>, ProfileError> {
    let mut changed = policy.to_owned();
    let mut reader = Reader { bytes: policy, at: 0 };
    let (mut versions, mut last) = (0, Vec::new());
    while reader.at < policy.len() {
        let at = reader.at;
        match reader.item()? {
            Item::Name(tag) => last = tag.to_vec(),
            Item::Number(version) if last == b"version" => {
                let bytes = (version | FORCE_COMPLAIN).to_le_bytes();
                let place = changed.get_mut(at + 1..at + 5);
                place.ok_or(ProfileError::Malformed(at))?.copy_from_slice(&bytes);
                versions += 1;
                last.clear();
            }
            Item::Open if last == b"profile" => {}
            Item::Text(found) if last == b"profile" => {
                let found = String::from_utf8_lossy(found).into_owned();
                let own = found == name
                    || found
                        .strip_prefix(name)
                        .is_some_and(|rest| rest.starts_with("//"));
                if !own {
                    return Err(ProfileError::NotAlone(found));
                }
                last.clear();
            }
            Item::Open | Item::Text(_) | Item::Number(_) | Item::Other => last.clear(),
        }
    }
    if versions == 0 {
        return Err(ProfileError::Malformed(0));
    }
    Ok(changed)
}

/// One item of a compiled policy.
enum Item<'a> {
    /// The name of the item that follows.
    Name(&'a [u8]),
    Text(&'a [u8]),
    Number(u32),
    /// A structure begins.
    Open,
    Other,
}

/// Reads items: a byte that says which, then the value, little endian (security/apparmor/include/policy_unpack.h).
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn item(&mut self) -> Result<Item<'a>, ProfileError> {
        let [code] = self.take::<1>()?;
        Ok(match code {
            0 => self.skip(1)?,
            1 | 11 => self.skip(2)?,
            CODE_U32 => Item::Number(u32::from_le_bytes(self.take()?)),
            3 => self.skip(8)?,
            CODE_NAME => Item::Name(self.text()?),
            CODE_STRING => Item::Text(self.text()?),
            6 => {
                let length = u32::from_le_bytes(self.take()?);
                self.skip(usize::try_from(length).unwrap_or(usize::MAX))?
            }
            7 => Item::Open,
            8..=10 | 12 => Item::Other,
            _ => return Err(ProfileError::Malformed(self.at)),
        })
    }

    /// With a length of two bytes, and a zero at its end.
    fn text(&mut self) -> Result<&'a [u8], ProfileError> {
        let length = u16::from_le_bytes(self.take()?);
        let text = self.slice(length.into())?;
        Ok(text.strip_suffix(&[0]).unwrap_or(text))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ProfileError> {
        let at = self.at;
        self.slice(N)?.try_into().map_err(|_| ProfileError::Malformed(at))
    }

    fn skip(&mut self, length: usize) -> Result<Item<'a>, ProfileError> {
        self.slice(length).map(|_| Item::Other)
    }

    fn slice(&mut self, length: usize) -> Result<&'a [u8], ProfileError> {
        let end = self.at.checked_add(length);
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let found = found.ok_or(ProfileError::Malformed(self.at))?;
        self.at += length;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel 6.12 gave for a profile that apparmor_parser 4.1 had compiled.
    const REAL: &[u8] = include_bytes!("testdata/strict.policy");

    #[test]
    fn the_copy_differs_from_the_real_policy_in_one_bit() {
        let changed = complaining("sec-test", REAL).unwrap();
        let differing: Vec<_> = REAL.iter().zip(&changed).filter(|(a, b)| a != b).collect();
        assert_eq!((changed.len(), differing), (REAL.len(), vec![(&0x20, &0x28)]));
    }

    #[test]
    fn a_policy_that_holds_another_profile_is_not_touched() {
        for name in ["sec", "sec-test/x", "../sec-test", ""] {
            assert!(
                matches!(complaining(name, REAL), Err(ProfileError::NotAlone(_))),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        for length in 0..REAL.len() {
            let cut = REAL.get(..length).unwrap();
            // Cut between two items it is a policy still, which the kernel refuses.
            if let Ok(changed) = complaining("sec-test", cut) {
                assert_eq!(changed.len(), cut.len());
            }
        }
        assert!(complaining("a", b"").is_err());
        assert!(complaining("a", &[6, 255, 255, 255, 255]).is_err());
        assert!(complaining("a", &[99; 64]).is_err());
    }

    #[test]
    fn a_policy_of_ten_megabytes_is_walked_at_once() {
        let mut large = REAL.to_vec();
        large.push(6);
        large.extend_from_slice(&(10u32 << 20).to_le_bytes());
        large.resize(large.len() + (10 << 20), 0xff);
        let started = std::time::Instant::now();
        let changed = complaining("sec-test", &large).unwrap();
        assert_eq!(changed.len(), large.len());
        assert!(started.elapsed() < std::time::Duration::from_secs(5));
    }
}
