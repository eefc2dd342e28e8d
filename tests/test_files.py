import builtins
import errno
import os
import pathlib
import stat
from unittest import mock

from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import files


class WriteAtomicallyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'scores.csv'

  def _write(self, content, mode='w'):
    with files.write_atomically(str(self.path), mode) as file:
      file.write(content)

  def test_the_new_content_replaces_the_old(self):
    for content in ('old, longer than the new', 'a\n\u00e4'):
      self._write(content)
      self.assertEqual(self.path.read_text('utf-8'), content)
    self._write(b'\x00\xff', 'wb')
    self.assertEqual(self.path.read_bytes(), b'\x00\xff')
    self.assertEqual(os.listdir(self.folder), ['scores.csv'])

  def test_readers_see_the_old_file_until_the_block_ends(self):
    self._write('old')
    with files.write_atomically(str(self.path)) as file:
      file.write('new')
      file.flush()
      self.assertEqual(self.path.read_text(), 'old')
    self.assertEqual(self.path.read_text(), 'new')

  @parameterized.parameters('fsync', 'replace')
  def test_a_full_disk_keeps_the_old_file_and_is_named(self, function):
    self._write('old')
    full = OSError(errno.ENOSPC, 'No space left on device')
    with (
      mock.patch.object(files.os, function, side_effect=full),
      self.assertRaisesRegex(OSError, 'No space left.*scores.csv.$'),
    ):
      self._write('new')
    self.assertEqual(self.path.read_text(), 'old')
    self.assertEqual(os.listdir(self.folder), ['scores.csv'])

  @parameterized.parameters(ValueError, KeyboardInterrupt, OSError)
  def test_a_failing_block_keeps_the_old_file(self, error):
    self._write('old')
    with self.assertRaisesRegex(error, 'its text'):
      with files.write_atomically(str(self.path)) as file:
        file.write('half')
        raise error('its text')
    self.assertEqual(self.path.read_text(), 'old')
    self.assertEqual(os.listdir(self.folder), ['scores.csv'])

  def test_leftovers_of_a_killed_process_are_overwritten(self):
    (self.folder / 'scores.csv.tmp').write_text('half of something longer')
    self._write('new')
    self.assertEqual(self.path.read_text(), 'new')
    self.assertEqual(os.listdir(self.folder), ['scores.csv'])

  def test_permissions_and_links_are_kept(self):
    self._write('old')
    self.path.chmod(0o640)
    link = self.folder / 'link'
    link.symlink_to('scores.csv')
    with files.write_atomically(str(link)) as file:
      file.write('new')
    self.assertTrue(link.is_symlink())
    self.assertEqual(self.path.read_text(), 'new')
    self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o640)

  def test_a_new_file_has_the_permissions_of_any_new_file(self):
    self._write('new')
    (self.folder / 'other').touch()
    self.assertEqual(
      self.path.stat().st_mode, (self.folder / 'other').stat().st_mode
    )

  def test_a_device_is_written_and_stays_a_device(self):
    with files.write_atomically(os.devnull) as file:
      file.write('gone')
    self.assertTrue(stat.S_ISCHR(os.stat(os.devnull).st_mode))

  def test_a_folder_that_is_not_writable_is_named_as_the_reason(self):
    self._write('old')
    # Root, as whom tests may run, can write to any folder.
    for exists, message in (
      (True, 'scores.csv. is writable, but its folder is not, .* another one.'),
      (False, 'Permission denied: .*scores.csv.$'),
    ):
      if not exists:
        self.path.unlink()
      refused = PermissionError(
        errno.EACCES, 'Permission denied', f'{self.path}.tmp'
      )
      with mock.patch.object(builtins, 'open', side_effect=refused):
        with self.assertRaisesRegex(OSError, message):
          with files.write_atomically(str(self.path)):
            self.fail('It was opened.')
      if exists:
        self.assertEqual(self.path.read_text(), 'old')

  def test_a_missing_folder_is_named_by_the_final_path(self):
    path = str(self.folder / 'missing' / 'scores.csv')
    with self.assertRaisesRegex(OSError, 'missing/scores.csv.$'):
      with files.write_atomically(path):
        pass


class CreateFolderAtomicallyTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'records'

  def test_it_appears_when_it_is_complete(self):
    (self.folder / 'records.part' / 'old').mkdir(parents=True)
    with files.create_folder_atomically(str(self.path)) as part:
      self.assertEqual(os.listdir(part), [])
      (pathlib.Path(part) / 'a').touch()
      self.assertFalse(self.path.exists())
    self.assertEqual(os.listdir(self.folder), ['records'])
    self.assertEqual(os.listdir(self.path), ['a'])

  def test_a_failing_block_leaves_nothing(self):
    with self.assertRaises(KeyboardInterrupt):
      with files.create_folder_atomically(str(self.path)) as part:
        (pathlib.Path(part) / 'a').touch()
        raise KeyboardInterrupt
    self.assertEmpty(os.listdir(self.folder))


if __name__ == '__main__':
  absltest.main()
