"""Makes small archives in the exact layouts of the published datasets."""

import io
import os
import tarfile
import zipfile

import numpy as np
from PIL import Image
from scipy import io as scipy_io


def make_image(number, size=(20, 24)):
  """Returns a small JPEG, different for each number."""
  rng = np.random.default_rng(number)
  pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'JPEG')
  return buffer.getvalue()


def write_zip(path, files):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in files.items():
      archive.writestr(name, content)


def write_tgz(path, files):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def write_folder(path, files):
  for name, content in files.items():
    target = os.path.join(path, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, 'wb') as file:
      file.write(content)


def _lines(rows):
  return ''.join(' '.join(map(str, row)) + '\n' for row in rows).encode()


def cub200(classes=(1, 2, 100, 101, 199, 200), images=3):
  """Returns the files in CUB_200_2011.tgz; ids start at 1, no header lines."""
  files, paths, labels, splits = {'attributes.txt': b'1 x\n'}, [], [], []
  for number in classes:
    folder = f'{number:03}.Bird_{number}'
    for image in range(images):
      path = f'{folder}/Bird_{number}_{image:04}_{number * 1000 + image}.jpg'
      paths.append((len(paths) + 1, path))
      labels.append((len(paths), number))
      splits.append((len(paths), image % 2))
      files[f'CUB_200_2011/images/{path}'] = make_image(number * 100 + image)
  names = [(number, f'{number:03}.Bird_{number}') for number in classes]
  tables = {
    'images.txt': paths,
    'image_class_labels.txt': labels,
    'train_test_split.txt': splits,
    'classes.txt': names,
    'bounding_boxes.txt': [(i, 1.0, 1.0, 9.0, 9.0) for i, _ in paths],
    'README': [('birds',)],
  }
  return files | {f'CUB_200_2011/{n}': _lines(r) for n, r in tables.items()}


def _matrix(**variables):
  buffer = io.BytesIO()
  scipy_io.savemat(buffer, variables)
  return buffer.getvalue()


def _struct(rows, fields):
  array = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
  for index, row in enumerate(rows):
    array[0, index] = tuple(row)
  return array


def _names(count=196):
  names = np.empty((1, count), object)
  names[0] = [f'Make Model C/V {number} 2012' for number in range(1, count + 1)]
  return names


_BOX = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2')


def cars196(classes=(1, 2, 98, 99, 195, 196), images=3):
  """Returns (files in car_ims.tgz, files beside it)."""
  files, rows = {}, []
  for number in classes:
    for image in range(images):
      path = f'car_ims/{len(rows) + 1:06}.jpg'
      files[path] = make_image(number * 100 + image)
      rows.append((path, 1, 1, 9, 9, number, image % 2))
  fields = ('relative_im_path', *_BOX, 'class', 'test')
  annotations = _matrix(annotations=_struct(rows, fields), class_names=_names())
  return files, {'cars_annos.mat': annotations}


def cars196_for_classification(classes=(1, 2, 98, 99, 195, 196), images=4):
  """Returns the files in cars_train.tgz, cars_test.tgz and car_devkit.tgz, and
  the file beside them."""
  parts, rows = {'cars_train': {}, 'cars_test': {}}, {}
  for number in reversed(classes):
    for image in range(images):
      part = ('cars_train', 'cars_test')[image % 2]
      name = f'{len(parts[part]) + 1:05}.jpg'
      parts[part][f'{part}/{name}'] = make_image(number * 100 + image)
      rows.setdefault(part, []).append((1, 1, 9, 9, number, name))
  fields = (*_BOX, 'class', 'fname')
  devkit = {
    'devkit/cars_train_annos.mat': _matrix(
      annotations=_struct(rows['cars_train'], fields)
    ),
    'devkit/cars_meta.mat': _matrix(class_names=_names()),
  }
  labels = _matrix(annotations=_struct(rows['cars_test'], fields))
  return (
    parts['cars_train'],
    parts['cars_test'],
    devkit,
    {'cars_test_annos_withlabels.mat': labels},
  )


_KINDS = ('bicycle', 'cabinet', 'chair', 'coffee_maker')


def sop(num_train=4, num_test=3, images=3, content=make_image):
  """Returns the files in Stanford_Online_Products.zip; class ids start at 1."""
  header = ('image_id', 'class_id', 'super_class_id', 'path')
  files, rows, image_id = {}, {'train': [header], 'test': [header]}, 0
  for number in range(1, num_train + num_test + 1):
    kind = number % len(_KINDS)
    for image in range(images):
      image_id += 1
      path = f'{_KINDS[kind]}_final/{110000000000 + number}_{image}.JPG'
      split = 'train' if number <= num_train else 'test'
      rows[split].append((image_id, number, kind + 1, path))
      files[f'Stanford_Online_Products/{path}'] = content(image_id)
  tables = {
    'Ebay_train.txt': rows['train'],
    'Ebay_test.txt': rows['test'],
    'Ebay_info.txt': rows['train'] + rows['test'][1:],
  }
  return files | {
    f'Stanford_Online_Products/{name}': _lines(table)
    for name, table in tables.items()
  }


def inshop(num_train=3, num_test=3):
  """Returns (files in Img/img.zip, files beside Img)."""
  rows, files = [], {}
  for number in range(1, num_train + num_test + 1):
    for image in range(4):
      split = ('query', 'gallery')[image % 2] if number > num_train else 'train'
      item = f'id_{number:08}'
      gender = ('WOMEN/Dresses', 'MEN/Denim')[number % 2]
      path = f'img/{gender}/{item}/{image + 1:02}_1_front.jpg'
      rows.append(f'{path:<70}{item}   {split}')
      files[path] = make_image(number * 100 + image)
  header = [str(len(rows)), 'image_name item_id evaluation_status']
  partition = '\n'.join(header + rows) + '\n'
  return files, {'Eval/list_eval_partition.txt': partition.encode()}


def market1501(people=3):
  """Returns the files in Market-1501-v15.09.15.zip."""
  root = 'Market-1501-v15.09.15'
  files = {
    f'{root}/bounding_box_test/Thumbs.db': b'x',
    f'{root}/bounding_box_test/-1_c1s1_000001_00.jpg': make_image(1),
    f'{root}/bounding_box_test/0000_c1s1_000002_00.jpg': make_image(2),
    f'{root}/bounding_box_test/0000_c3s2_000003_00.jpg': make_image(3),
    f'{root}/gt_bbox/0001_c1s1_001051_00.jpg': make_image(4),
    f'{root}/readme.txt': b'x',
  }
  for person in range(1, 2 * people + 1):
    for camera in range(1, 5):
      name = f'{person:04}_c{camera}s1_{person:06}_0{camera}.jpg'
      is_train = person <= people
      folder = 'bounding_box_train' if is_train else 'bounding_box_test'
      number = person * 100 + camera
      files[f'{root}/{folder}/{name}'] = make_image(number)
      if not is_train and camera == 1:
        files[f'{root}/query/{name}'] = make_image(number)
  return files
