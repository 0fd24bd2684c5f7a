"""The board's alerts, in each of its languages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .texts import in_language

# {key} of a field stands for its label; other names in braces are given.
ALERTS: dict[str, dict[str, str]] = {
    "en": {
        "fallen": "The run degenerates: chosen and rejected responses both become much less likely.",
        "not_a_number": "The run has degenerated: log-probabilities are no longer finite numbers.",
        "stopped": "{pref_stop_on_degeneration} saved a checkpoint and ended the run at step {step} of {total}.",
        "remedies": "Try MinorDPO or DPOP, a larger beta, or a smaller learning rate.",
        "twice": "{field} is set both in its field and in {extra_args}. Clear one of them.",
        "out_of_range": "{field} is {value}. Write {wanted}.",
        "no_number": "{field} is {value!r}. Write a number such as {like}.",
        "not_an_object": '{pref_loss_args} is not a JSON object. Write it like {{"tau": 0.5}}.',
        "refers": "{field} contains ${{, which a recipe reads as a reference to another key. Remove it.",
        "unused_prompt": "{sr_prompt} has no effect while {sr_lambda} is 0. Raise the lambda, or clear the prompt.",
        "unknown_loss": (
            "The loss {loss!r} is not registered on this board. Choose another one in {pref_loss}, or name the Python "
            "file that registers it in {pref_loss_file}."
        ),
        "not_in_file": (
            "{pref_loss_file} does not register the loss {loss!r}. Choose {names} in {pref_loss}, or change the file."
        ),
        "forbidden": (
            "This board may not read {file}. To let it read loss files from a folder, start it with "
            "{variable}=/that/folder in its environment."
        ),
        "demo": "This board is a demo and reads no loss files. Train with `llamafactory-cli train` instead.",
        "no_file": "{pref_loss_file} {file} is not a file (looked for {full}). Write the path of a Python file.",
        "unread": "This version of {file} has not been read yet. Press Enter in {pref_loss_file}.",
    },
    "ru": {
        "fallen": "Обучение вырождается: и выбранные, и отвергнутые ответы становятся намного менее вероятными.",
        "not_a_number": "Обучение выродилось: логарифмы вероятностей перестали быть конечными числами.",
        "stopped": (
            "{pref_stop_on_degeneration}: контрольная точка сохранена, обучение завершено на шаге {step} из {total}."
        ),
        "remedies": "Попробуйте MinorDPO или DPOP, большее beta или меньшую скорость обучения.",
        "twice": "{field}: значение задано и в поле, и в {extra_args}. Удалите одно из двух.",
        "out_of_range": "{field}: значение {value} недопустимо. Введите {wanted}.",
        "no_number": "{field}: {value!r} не является числом. Введите число, например {like}.",
        "not_an_object": '{pref_loss_args}: это не объект JSON. Введите его, например, так: {{"tau": 0.5}}.',
        "refers": "{field}: текст содержит ${{, а рецепт читает это как ссылку на другой ключ. Удалите эти знаки.",
        "unused_prompt": "{sr_prompt} не действует, пока {sr_lambda} равна 0. Увеличьте лямбду или очистите промпт.",
        "unknown_loss": (
            "Функция потерь {loss!r} не зарегистрирована на этой панели. Выберите другую в поле {pref_loss} или "
            "укажите файл Python, который её регистрирует, в поле {pref_loss_file}."
        ),
        "not_in_file": (
            "{pref_loss_file} не регистрирует функцию потерь {loss!r}. Выберите {names} в поле {pref_loss} или "
            "измените файл."
        ),
        "forbidden": (
            "Этой панели нельзя читать {file}. Чтобы она читала файлы функций потерь из папки, запустите её с "
            "переменной среды {variable}=/эта/папка."
        ),
        "demo": "Это демонстрационная панель: она не читает файлы функций потерь. Запустите `llamafactory-cli train`.",
        "no_file": "{pref_loss_file}: {file} не является файлом (поиск в {full}). Введите путь к файлу Python.",
        "unread": "Эта версия {file} ещё не прочитана. Нажмите Enter в поле {pref_loss_file}.",
    },
    "zh": {
        "fallen": "训练正在退化：被选回答和被拒回答的概率都大幅下降。",
        "not_a_number": "训练已经退化：对数概率不再是有限数值。",
        "stopped": "{pref_stop_on_degeneration}已在第 {step} 步（共 {total} 步）保存检查点并结束训练。",
        "remedies": "请尝试 MinorDPO 或 DPOP、更大的 beta 或更小的学习率。",
        "twice": "{field}同时在输入框和{extra_args}中设置。请清除其一。",
        "out_of_range": "{field}的值为 {value}。请填写{wanted}。",
        "no_number": "{field}的值 {value!r} 不是数字。请填写数字，例如 {like}。",
        "not_an_object": '{pref_loss_args}不是 JSON 对象。请按 {{"tau": 0.5}} 的形式填写。',
        "refers": "{field}包含 ${{，配方会把它当作对其他键的引用。请删除它。",
        "unused_prompt": "{sr_lambda}为 0 时，{sr_prompt}不起作用。请增大 lambda，或清空提示词。",
        "unknown_loss": (
            "此面板未注册损失函数 {loss!r}。请在{pref_loss}中选择其他损失，或在{pref_loss_file}中填写注册它的 "
            "Python 文件。"
        ),
        "not_in_file": "{pref_loss_file}没有注册损失函数 {loss!r}。请在{pref_loss}中选择 {names}，或修改该文件。",
        "forbidden": "此面板不能读取 {file}。要读取某个文件夹中的文件，请用环境变量 {variable}=/该文件夹 启动。",
        "demo": "此面板是演示版，不读取损失函数文件。请改用 `llamafactory-cli train` 训练。",
        "no_file": "{pref_loss_file}中的 {file} 不是文件（查找位置：{full}）。请填写 Python 文件的路径。",
        "unread": "尚未读取 {file} 的当前版本。请在{pref_loss_file}中按回车。",
    },
    "ko": {
        "fallen": "학습이 퇴화하고 있습니다. 선택된 응답과 거부된 응답의 확률이 모두 크게 낮아지고 있습니다.",
        "not_a_number": "학습이 퇴화했습니다. 로그 확률이 더 이상 유한한 수가 아닙니다.",
        "stopped": (
            "{pref_stop_on_degeneration}: 전체 {total}단계 중 {step}단계에서 체크포인트를 저장하고 학습을 끝냈습니다."
        ),
        "remedies": "MinorDPO나 DPOP, 더 큰 beta, 더 작은 학습률을 시도해 보십시오.",
        "twice": "{field}: 입력란과 {extra_args}에 모두 설정되어 있습니다. 하나를 지우십시오.",
        "out_of_range": "{field}: {value}은(는) 쓸 수 없습니다. {wanted}를 입력하십시오.",
        "no_number": "{field}: {value!r}은(는) 숫자가 아닙니다. {like}처럼 숫자를 입력하십시오.",
        "not_an_object": '{pref_loss_args}: JSON 객체가 아닙니다. {{"tau": 0.5}}처럼 입력하십시오.',
        "refers": "{field}: ${{가 들어 있습니다. 레시피는 이를 다른 키에 대한 참조로 읽습니다. 지우십시오.",
        "unused_prompt": (
            "{sr_prompt}: {sr_lambda} 값이 0이면 효과가 없습니다. 람다를 높이거나 프롬프트를 비우십시오."
        ),
        "unknown_loss": (
            "로스 {loss!r}은(는) 이 보드에 등록되어 있지 않습니다. {pref_loss}에서 다른 로스를 고르거나, 로스를 "
            "등록하는 Python 파일을 {pref_loss_file}에 입력하십시오."
        ),
        "not_in_file": (
            "{pref_loss_file}: 로스 {loss!r}을(를) 등록하지 않습니다. {pref_loss}에서 {names}을(를) 고르거나 파일을 "
            "고치십시오."
        ),
        "forbidden": (
            "이 보드는 {file}을(를) 읽을 수 없습니다. 폴더의 로스 파일을 읽게 하려면 환경 변수 {variable}=/그/폴더 로 "
            "보드를 시작하십시오."
        ),
        "demo": "이 보드는 데모이므로 로스 파일을 읽지 않습니다. `llamafactory-cli train`으로 학습하십시오.",
        "no_file": (
            "{pref_loss_file}: {file}은(는) 파일이 아닙니다(찾은 위치: {full}). Python 파일의 경로를 입력하십시오."
        ),
        "unread": "{file}의 현재 버전을 아직 읽지 않았습니다. {pref_loss_file}에서 Enter를 누르십시오.",
    },
    "ja": {
        "fallen": "学習が退化しています。選ばれた応答と拒否された応答の確率がどちらも大きく下がっています。",
        "not_a_number": "学習が退化しました。対数確率が有限の数値ではなくなりました。",
        "stopped": "{pref_stop_on_degeneration}により、{total} 中 {step} ステップで保存して学習を終了しました。",
        "remedies": "MinorDPO や DPOP、より大きな beta、より小さな学習率を試してください。",
        "twice": "{field}が入力欄と{extra_args}の両方で設定されています。どちらかを消してください。",
        "out_of_range": "{field}の値 {value} は使えません。{wanted}を入力してください。",
        "no_number": "{field}の値 {value!r} は数値ではありません。{like} のような数値を入力してください。",
        "not_an_object": '{pref_loss_args}は JSON オブジェクトではありません。{{"tau": 0.5}} のように書いてください。',
        "refers": "{field}に ${{ が含まれています。レシピでは別のキーへの参照になるので、削除してください。",
        "unused_prompt": "{sr_lambda}が 0 なので、{sr_prompt}は効果がありません。ラムダを上げるか欄を空にします。",
        "unknown_loss": (
            "損失 {loss!r} はこのボードに登録されていません。{pref_loss}で別の損失を選ぶか、登録する Python ファイルを"
            "{pref_loss_file}に入力してください。"
        ),
        "not_in_file": (
            "{pref_loss_file}は損失 {loss!r} を登録していません。{pref_loss}で {names} を選ぶか、"
            "ファイルを直してください。"
        ),
        "forbidden": (
            "このボードは {file} を読み込めません。フォルダの損失関数ファイルを読み込ませるには、環境変数 "
            "{variable}=/そのフォルダ を付けて起動してください。"
        ),
        "demo": "このボードはデモなので損失関数ファイルを読み込みません。`llamafactory-cli train` で学習してください。",
        "no_file": (
            "{pref_loss_file}の {file} はファイルではありません（探した場所：{full}）。Python ファイルのパスを入力して"
            "ください。"
        ),
        "unread": "{file} の現在の内容はまだ読み込まれていません。{pref_loss_file}で Enter を押してください。",
    },
}

# Of numbers, as `out_of_range` wants them.
RANGES: dict[str, dict[str, str]] = {
    "en": {
        "positive": "a number above 0",
        "nonnegative": "a number of at least 0",
        "below_half": "a number of at least 0 and below 0.5",
        "finite": "a finite number",
        "count": "a whole number of at least 1",
        "hundred": "a number from -100 to 100",
    },
    "ru": {
        "positive": "число больше 0",
        "nonnegative": "число не меньше 0",
        "below_half": "число не меньше 0 и меньше 0.5",
        "finite": "конечное число",
        "count": "целое число не меньше 1",
        "hundred": "число от -100 до 100",
    },
    "zh": {
        "positive": "大于 0 的数",
        "nonnegative": "不小于 0 的数",
        "below_half": "不小于 0 且小于 0.5 的数",
        "finite": "有限的数",
        "count": "不小于 1 的整数",
        "hundred": "-100 到 100 之间的数",
    },
    "ko": {
        "positive": "0보다 큰 수",
        "nonnegative": "0 이상의 수",
        "below_half": "0 이상 0.5 미만의 수",
        "finite": "유한한 수",
        "count": "1 이상의 정수",
        "hundred": "-100 이상 100 이하의 수",
    },
    "ja": {
        "positive": "0 より大きい数",
        "nonnegative": "0 以上の数",
        "below_half": "0 以上 0.5 未満の数",
        "finite": "有限の数",
        "count": "1 以上の整数",
        "hundred": "-100 以上 100 以下の数",
    },
}
QUOTES = {"en": "“{}”", "ru": "«{}»", "zh": "“{}”", "ko": "‘{}’", "ja": "「{}」"}


class BoardError(ValueError):
    """An error that the board has a sentence for, in each of its languages; as text, in English with keys for labels.

    Args:
        name: of the alert.
        values: what it holds in braces.
    """

    def __init__(self, name: str, **values: str) -> None:
        super().__init__(alert(name, "en", values, lambda key: f"`{key}`"))
        self.name, self.values = name, values


class _Filled(dict[str, Any]):
    """Values by name, and labels for keys of fields."""

    def __init__(self, values: Mapping[str, Any], label: Callable[[str], str]) -> None:
        super().__init__(values)
        self.label = label

    def __missing__(self, key: str) -> str:
        return self.label(key)


def alert(name: str, lang: str, values: Mapping[str, Any], label: Callable[[str], str]) -> str:
    """An alert with its values, and with labels for the keys of fields that it names."""
    return in_language(lang, ALERTS)[name].format_map(_Filled(values, label))


def wanted(name: str, lang: str) -> str:
    """A range of numbers, in words."""
    return in_language(lang, RANGES)[name]


def quoted(text: str, lang: str) -> str:
    return in_language(lang, QUOTES).format(text)


def joined(sentences: Sequence[str], lang: str) -> str:
    """Sentences in a row. The full stop of Chinese and Japanese is as wide as a letter, and no space follows it."""
    return ("" if lang in ("zh", "ja") else " ").join(sentences)
